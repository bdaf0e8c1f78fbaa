"""Estimates of batch statistics, as buffers."""

from typing import Union

import torch
from torch import Tensor

from ..functional import snapshot, updated_estimates


class RunningStatistics:
    """Mixin for a layer with a ``momentum`` and estimates to move by it.

    Attributes:
        running_mean, running_var (Tensor): The estimates.
        num_batches_tracked (Tensor): Number of training forwards.
    """

    def _register_estimates(self, size: int, device=None, dtype=None) -> None:
        factory = dict(device=device, dtype=dtype)
        self.register_buffer('running_mean', torch.empty(size, **factory))
        self.register_buffer('running_var', torch.empty(size, **factory))
        self.register_buffer(
            'num_batches_tracked', torch.tensor(0, device=device)
        )

    def reset_running_stats(self) -> None:
        """Forget the estimates: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def _estimates(self, dtype: torch.dtype) -> dict:
        # Copies: a layer that is shared between levels runs again, and
        # updates the buffers, before this call's backward needs them.
        if self.training and torch.compiler.is_compiling():
            return dict(
                running_mean=snapshot(self.running_mean).to(dtype),
                running_var=snapshot(self.running_var).to(dtype),
            )
        return dict(
            running_mean=self.running_mean.to(dtype, copy=True),
            running_var=self.running_var.to(dtype, copy=True),
        )

    @torch.no_grad()
    def _move_estimates(
        self, mean: Tensor, var: Tensor, is_filled: Union[int, Tensor]
    ) -> None:
        """Move the estimates towards a batch's statistics.

        Args:
            mean, var (Tensor): The statistics.
            is_filled (int | Tensor): 0 if the batch is empty, else 1.
        """
        self.num_batches_tracked += is_filled
        rate = self.momentum
        if rate is None:
            rate = self.num_batches_tracked.to(mean.dtype).reciprocal()
        new_mean, new_var = updated_estimates(
            **self._estimates(mean.dtype),
            # NaN for an empty batch, which leaves the estimates alone.
            mean=mean / is_filled,
            var=var / is_filled,
            rate=rate,
        )
        self.running_mean.copy_(new_mean)
        self.running_var.copy_(new_var)
