"""Estimates of batch statistics, as buffers."""

import math
from typing import Tuple, Union

import torch
from torch import Tensor

from ..functional import (
    moved_estimates,
    rate_of_forward,
    snapshot,
    updated_estimates,
)


class RunningStatistics:
    """Mixin for a layer with a ``momentum`` and estimates to move by it.

    Attributes:
        running_mean, running_var (Tensor): The estimates.
        num_batches_tracked (Tensor): Number of training forwards.
    """

    momentum_annealing = False

    def _register_estimates(self, size: int, device=None, dtype=None) -> None:
        for name in self.statistics:
            self._register_statistic(name, size, device=device, dtype=dtype)
        self.register_buffer(
            'num_batches_tracked', torch.tensor(0, device=device)
        )

    def reset_running_stats(self) -> None:
        """Forget the estimates: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    @property
    def loaded_count(self) -> int:
        """What to count for estimates that are to be moved by r at once."""
        if not self.momentum_annealing or not self.momentum:
            return 0
        return math.ceil(1 / self.momentum)

    @torch.no_grad()
    def _trust_estimates(self) -> None:
        """Count forwards for loaded estimates that come without a count.

        Those of torchvision's checkpoints say 0: the first forwards must not
        replace them.
        """
        count = self.num_batches_tracked
        if not self.loaded_count or count.is_meta:
            return
        is_new = (self.running_mean == 0).all() & (self.running_var == 1).all()
        if count == 0 and not is_new:
            count.fill_(self.loaded_count)

    def _rate(self) -> dict:
        """What makes the update rate of a forward."""
        return dict(
            count=self.num_batches_tracked,
            momentum=self.momentum,
            annealing=self.momentum_annealing,
        )

    def _estimates(self, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        # Copies where there is a backward pass: a layer that is shared
        # between levels runs again, and updates the buffers, before that.
        estimates = self.running_mean, self.running_var
        if self.training and torch.compiler.is_compiling():
            return tuple(snapshot(t).to(dtype) for t in estimates)
        copy = torch.is_grad_enabled()
        return tuple(t.to(dtype, copy=copy) for t in estimates)

    @torch.no_grad()
    def _move_estimates(
        self, mean: Tensor, var: Tensor, is_filled: Union[int, Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Move the estimates towards a batch's statistics.

        Args:
            mean, var (Tensor): The statistics.
            is_filled (int | Tensor): 0 if the batch is empty, else 1. An
                int is 1 here.

        Returns:
            tuple[Tensor]: The new estimates, in the dtype of statistics.
        """
        self.num_batches_tracked += is_filled
        rate = rate_of_forward(**self._rate(), dtype=mean.dtype)
        if isinstance(is_filled, Tensor):
            # NaN for an empty batch, which leaves the estimates alone.
            mean, var = mean / is_filled, var / is_filled
        return self._keep_estimates(
            *updated_estimates(
                self.running_mean.to(mean.dtype),
                self.running_var.to(var.dtype),
                mean,
                var,
                rate,
            )
        )

    @torch.no_grad()
    def _learn_moments(
        self, mean: Tensor, var: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Move the estimates towards the batch that has these moments."""
        self.num_batches_tracked += 1
        return self._keep_estimates(
            *moved_estimates(
                mean,
                var,
                running_mean=self.running_mean,
                running_var=self.running_var,
                **self._rate(),
            )
        )

    def _keep_estimates(self, *estimates: Tensor) -> Tuple[Tensor, Tensor]:
        """Put them into the buffers, and return them as they are there."""
        if torch.compiler.is_compiling():
            estimates = tuple(snapshot(t) for t in estimates)
        self.running_mean.copy_(estimates[0])
        self.running_var.copy_(estimates[1])
        dtype = estimates[0].dtype
        if self.running_mean.dtype != dtype:  # as they were rounded
            return self._estimates(dtype)
        return estimates
