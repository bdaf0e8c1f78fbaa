"""What every normalization layer here shares: checks, and loading."""

import numbers
from typing import Optional

import torch
from torch import Tensor, nn

from .batch_statistics import BatchStatistics
from .checkpoint_names import CheckpointNames


def check_count(layer: str, name: str, value) -> int:
    """Return ``value`` if it is a positive integer, else raise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f'{layer}: {name} must be a positive integer, got '
            f'{value!r} ({type(value).__name__})'
        )
    if value < 1:
        raise ValueError(
            f'{layer}: {name} must be a positive integer, got {value}'
        )
    return int(value)


def check_eps(layer: str, eps) -> float:
    """Return ``eps`` if it is a number >= 0, else raise."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(
            f'{layer}: eps must be a number >= 0, got {eps!r} '
            f'({type(eps).__name__})'
        )
    if not eps >= 0:
        raise ValueError(f'{layer}: eps must be a number >= 0, got {eps}')
    return float(eps)


def check_momentum(
    layer: str, momentum, optional: bool = True
) -> Optional[float]:
    """Return ``momentum`` if it is in [0, 1], or None where allowed."""
    allowed = 'a number in [0, 1]' + (' or None' if optional else '')
    if momentum is None and optional:
        return None
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(
            f'{layer}: momentum must be {allowed}, got '
            f'{momentum!r} ({type(momentum).__name__})'
        )
    if not 0 <= momentum <= 1:
        raise ValueError(
            f'{layer}: momentum must be {allowed}, got {momentum}'
        )
    return float(momentum)


def largest_divisor(num_features: int, num_groups: int) -> int:
    """The largest divisor of ``num_features`` not above ``num_groups``."""
    return next(
        g
        for g in range(min(num_groups, num_features), 0, -1)
        if num_features % g == 0
    )


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread.

    A forward pass inside one is activation checkpointing doing a forward
    again, which must repeat the first one: nothing may be updated.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class NormBase(CheckpointNames, nn.GroupNorm):
    """Base of the normalization layers.

    A GroupNorm to the ecosystem: the one class that every rule (weight
    decay, initialization) takes for a normalization and that none rewrites,
    as ``fuse_conv_bn`` and ``convert_sync_batchnorm`` rewrite a
    ``_BatchNorm``.
    """

    def __init__(self, num_features: int, num_groups: int, eps: float):
        name = type(self).__name__
        num_features = check_count(name, 'num_features', num_features)
        super().__init__(
            num_groups, num_features, check_eps(name, eps), affine=False
        )
        self.num_features = num_features
        self.affine = True

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        # The way of convert_sync_batchnorm and of revert_sync_batchnorm.
        if name == 'batch_statistics':
            module = BatchStatistics.in_place_of(module)
        super().add_module(name, module)

    def check_input(self, x: Tensor) -> None:
        """Raise unless ``x`` is what this layer normalizes."""
        name = type(self).__name__
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f'{name}({self.num_features}): expected a '
                f'floating-point tensor, got {got}'
            )
        if not 3 <= x.dim() <= 5 or x.shape[1] != self.num_features:
            raise ValueError(
                f'{name}({self.num_features}): expected an input of shape '
                f'(N, {self.num_features}, *) with 3 to 5 dimensions, got '
                f'{tuple(x.shape)}'
            )

    def check_batch(
        self, batch, x: Tensor, channels: int, what: str, advice: str
    ) -> None:
        """Raise where a training batch has one value a statistic.

        Args:
            batch (Batch | SharedBatch): The batch.
            x (Tensor): Its activations.
            channels (int): How many channels have one statistic together.
            what (str): What they are called.
            advice (str): What to do about it.
        """
        if batch.has_single_value(channels):
            raise ValueError(
                f'{type(self).__name__}({self.num_features}, num_groups='
                f'{self.num_groups}): expected more than one value per {what} '
                f'in training, got an input of shape {tuple(x.shape)}. '
                f'{advice}'
            )

    def extra_repr(self) -> str:
        return f'{self.num_features}, eps={self.eps}'
