"""The batch that statistics are taken over: of one process, or of all."""

import math
from functools import cached_property
from typing import Callable, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import (
    batch_statistics,
    moments_from_statistics,
    wants_graph,
)


def _positions(x: Tensor) -> int:
    return math.prod(x.shape) // x.shape[1]


class Batch:
    """The samples of this process.

    Args:
        x (Tensor): Activations, shape (N, C, *).
    """

    def __init__(self, x: Tensor):
        self.num_samples = len(x)
        self.num_positions = _positions(x)

    @property
    def is_filled(self) -> int:
        """Whether there is anything to take statistics of: 0 or 1."""
        return int(self.num_positions > 0)

    def bessel(self, channels: int = 1) -> float:
        """From a biased variance over ``channels`` to an unbiased one."""
        count = self.num_positions * channels
        return count / max(count - 1, 1)

    def has_single_value(self, channels: int) -> bool:
        """Whether statistics over ``channels`` are those of one value."""
        return self.num_positions * channels == 1

    statistics = staticmethod(batch_statistics)

    def sum(self, value: Tensor) -> Tensor:
        """A sum over the batch, from this process's share of it."""
        return value

    def pool(self, statistics: Tensor, pooled: Callable) -> Tensor:
        """Statistics of the batch, from those of this process's samples.

        Args:
            statistics (Tensor): Of each sample, shape (N, *).
            pooled (Callable): From statistics and the shares of their
                samples, which sum to 1, to those of all.
        """
        if len(statistics) == 1:
            return statistics[0]
        share = statistics.new_full((len(statistics),), 1 / len(statistics))
        return pooled(statistics, share)


class SharedBatch:
    """The samples of all processes of a group.

    One small gathering, when it is made; gradients of :attr:`statistics`
    take one small reduction in the backward pass. Every sample counts the
    same, whichever process has it, and a process may have none, but every
    one must come here as often as the others.

    Args:
        x (Tensor): This process's activations, shape (N, C, *).
        mean, var (Tensor): Their moments, shape (N, C).
        group (ProcessGroup): The processes.

    Attributes:
        statistics (SharedStatistics): See
            :func:`wsbcn_mm.functional.batch_statistics`.
    """

    def __init__(self, x: Tensor, mean: Tensor, var: Tensor, group):
        self._group = group
        samples = len(x) if x.numel() else 0
        # Filled there: numbers of a list would be copied, and waited for.
        counts = [mean.new_full((1,), n) for n in (samples, _positions(x))]
        local = torch.cat([*counts, *_of_process(mean, var)])
        every = local.new_empty(dist.get_world_size(group), len(local))
        dist.all_gather(list(every.unbind()), local, group=group)
        counts, *moments = every.split([2, *mean.shape[1:] * 2], dim=1)
        samples, positions = counts.sum(0).unbind()
        self.num_samples = samples.clamp(min=1)
        self.statistics = SharedStatistics(
            *moments, counts[:, :1], self.num_samples, group
        )
        self._shares = counts[:, 0] / self.num_samples
        self.num_positions = positions
        self.is_filled = samples > 0

    def bessel(self, channels: int = 1) -> Tensor:
        """From a biased variance over ``channels`` to an unbiased one."""
        count = self.num_positions * channels
        return count / (count - 1).clamp(min=1)

    def has_single_value(self, channels: int) -> bool:
        """Not known here: the count is on the accelerator."""
        return False

    def sum(self, value: Tensor) -> Tensor:
        """A sum over the batch, from this process's share of it."""
        value = value.clone()
        dist.all_reduce(value, group=self._group)
        return value

    def pool(self, statistics: Tensor, pooled: Callable) -> Tensor:
        """Statistics of the batch, from those of this process's samples."""
        if len(statistics):
            local = Batch.pool(self, statistics, pooled)
        else:
            local = statistics.sum(0)
        every = local.new_empty(len(self._shares), *local.shape)
        dist.all_gather(list(every.unbind()), local, group=self._group)
        return pooled(every, self._shares)


def _of_process(mean: Tensor, var: Tensor) -> Tuple[Tensor, Tensor]:
    """Statistics of a process's samples, 0 where it has none."""
    if len(mean) == 0:  # sums, so that its backward pass comes here as well
        return mean.sum(0), var.sum(0)
    return batch_statistics(mean, var)


class SharedStatistics:
    """From this process's moments to the statistics of all samples.

    Args:
        mean, var (Tensor): Each process's statistics, shape (P, C).
        counts (Tensor): How many samples each has, shape (P, 1).
        samples (Tensor): How many all have.
        group (ProcessGroup): The processes.
    """

    def __init__(
        self,
        mean: Tensor,
        var: Tensor,
        counts: Tensor,
        samples: Tensor,
        group,
    ):
        # Processes' statistics are the moments of unequal samples.
        self._mean, self._var = mean, var
        self._shares = counts / samples
        self._samples = samples
        self._group = group

    def __call__(
        self, mean: Tensor, var: Tensor, center: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """The statistics.

        Args:
            mean, var (Tensor): The moments that the batch was made with.
            center (Tensor | None): What the squares are taken about.
        """
        moments = self._mean, self._var
        if wants_graph(mean, var):
            local = _of_process(mean, var)
            moments = _Gathered.apply(*local, *moments, self._group)
        elif center is None:
            return self._result
        return batch_statistics(*moments, center=center, share=self._shares)

    def vjp(self, mean: Tensor, var: Tensor):
        """The statistics, and from their gradients those of the moments."""
        batch_mean, batch_var = self._result

        def pull_back(grad_mean: Tensor, grad_var: Tensor):
            grads = torch.stack([grad_mean, grad_var])
            dist.all_reduce(grads, group=self._group)
            return moments_from_statistics(
                *grads.unbind(), mean - batch_mean, self._samples
            )

        return batch_mean, batch_var, pull_back

    @cached_property
    def _result(self) -> Tuple[Tensor, Tensor]:
        return batch_statistics(self._mean, self._var, share=self._shares)


class _Gathered(torch.autograd.Function):
    """What was gathered already; its gradient is summed over processes."""

    @staticmethod
    def forward(ctx, mean, var, every_mean, every_var, group):
        ctx.group = group
        return every_mean.clone(), every_var.clone()

    @staticmethod
    def backward(ctx, *grads):
        grads = torch.stack(grads)
        dist.all_reduce(grads, group=ctx.group)
        mean, var = grads[:, dist.get_rank(ctx.group)]
        return mean, var, None, None, None


def shared_group(layer: nn.Module):
    """The processes that a layer shares its batches with, or None."""
    if (
        not layer.is_synchronized
        or not dist.is_available()
        or not dist.is_initialized()
    ):
        return None
    group = layer.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def batch_of(
    layer: nn.Module, x: Tensor, mean: Tensor, var: Tensor
) -> Union[Batch, SharedBatch, None]:
    """The batch to take statistics over, or None where there is none.

    Args:
        layer (NormBase): The layer.
        x (Tensor): Activations.
        mean, var (Tensor): Their moments.
    """
    group = shared_group(layer)
    if group is not None:
        return SharedBatch(x, mean, var, group)
    return Batch(x) if x.numel() else None
