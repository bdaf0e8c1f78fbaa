"""The batch that statistics are taken over: of one process, or of all."""

import math
from typing import Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import batch_statistics
from .batch_statistics import SharedBatchStatistics


def _positions(x: Tensor) -> int:
    return math.prod(x.shape) // x.shape[1]


class Batch:
    """The samples of this process.

    Args:
        x (Tensor): Activations, shape (N, C, *).
    """

    def __init__(self, x: Tensor):
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


class SharedBatch:
    """The samples of all processes of a group.

    One small gathering, when it is made; gradients of :meth:`statistics`
    take one small reduction in the backward pass. Every sample counts the
    same, whichever process has it, and a process may have none, but every
    one must come here as often as the others.

    Args:
        x (Tensor): This process's activations, shape (N, C, *).
        mean, var (Tensor): Their moments, shape (N, C).
        group (ProcessGroup): The processes.
    """

    def __init__(self, x: Tensor, mean: Tensor, var: Tensor, group):
        self._group = group
        positions = _positions(x)
        counts = mean.new_tensor([len(x) if positions else 0, positions])
        local = torch.cat([counts, self._local(mean, var).flatten()])
        rows = [
            torch.empty_like(local) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(rows, local, group=group)
        counts, local = torch.stack(rows).split([2, len(local) - 2], dim=1)
        samples, positions = counts.sum(0).unbind()
        self._locals = local.unflatten(1, (2, -1))
        self._shares = counts[:, :1] / samples.clamp(min=1)
        self.num_positions = positions
        self.is_filled = samples > 0

    def bessel(self, channels: int = 1) -> Tensor:
        """From a biased variance over ``channels`` to an unbiased one."""
        count = self.num_positions * channels
        return count / (count - 1).clamp(min=1)

    def has_single_value(self, channels: int) -> bool:
        """Not known here: the count is on the accelerator."""
        return False

    @staticmethod
    def _local(mean: Tensor, var: Tensor) -> Tensor:
        share = mean.new_full((len(mean), 1), 1 / max(len(mean), 1))
        return torch.stack(batch_statistics(mean, var, share=share))

    def statistics(
        self, mean: Tensor, var: Tensor, center: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """See :func:`wsbcn_mm.functional.batch_statistics`.

        Args:
            mean, var (Tensor): The moments this batch was made with.
            center (Tensor | None): What the squares are taken about.
        """
        every = _Gathered.apply(
            self._local(mean, var), self._locals, self._group
        )
        # The processes' statistics are the moments of unequal samples.
        return batch_statistics(
            *every.unbind(1), center=center, share=self._shares
        )

    def sum(self, value: Tensor) -> Tensor:
        """A sum over the batch, from this process's share of it."""
        value = value.clone()
        dist.all_reduce(value, group=self._group)
        return value


class _Gathered(torch.autograd.Function):
    """What was gathered already; its gradient is summed over processes."""

    @staticmethod
    def forward(ctx, local, every, group):
        ctx.group = group
        return every.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None, None


def shared_group(switch: nn.Module):
    """The processes that a layer shares its batches with, or None.

    Args:
        switch (nn.Module): The layer's ``batch_statistics``.
    """
    if (
        not isinstance(switch, SharedBatchStatistics)
        or not dist.is_available()
        or not dist.is_initialized()
    ):
        return None
    group = switch.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def batch_of(
    switch: nn.Module, x: Tensor, mean: Tensor, var: Tensor
) -> Union[Batch, SharedBatch, None]:
    """The batch to take statistics over, or None where there is none.

    Args:
        switch (nn.Module): The layer's ``batch_statistics``.
        x (Tensor): Activations.
        mean, var (Tensor): Their moments.
    """
    group = shared_group(switch)
    if group is not None:
        return SharedBatch(x, mean, var, group)
    return Batch(x) if x.numel() else None
