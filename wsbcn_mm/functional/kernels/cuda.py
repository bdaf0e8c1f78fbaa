"""The CUDA kernels that PyTorch's SyncBatchNorm is made of.

They take half precision in with statistics in float32, and let the caller
bring the statistics: handed (1, N * C, L) views and our own numbers in their
place, they are the four passes, one launch each.
"""

from typing import Tuple

import torch
from torch import Tensor

from .closed_form import batch_channel
from .layout import memory_format
from .native_weight import standardize_weight
from .plain import moved_estimates

__all__ = [
    'affine',
    'batch_channel',
    'input_grad',
    'moments',
    'moved_estimates',
    'reduce',
    'standardize_weight',
]

_TINY = 1e-20


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    mean, inverse_std = torch.batch_norm_stats(_rows(x), 0.0)
    # A variance of 0 has 0 for the inverse of its root, with eps=0.
    var = torch.where(inverse_std > 0, inverse_std.pow(-2), 0)
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = torch.batch_norm_elemt(
        _rows(x),
        scale.flatten(),
        shift.flatten(),
        center.flatten(),
        torch.ones_like(center).flatten(),
        0.0,
    )
    return _unflatten(y, x)


def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    total, product, _, _ = torch.batch_norm_backward_reduce(
        _rows(grad),
        _rows(x),
        center.flatten(),
        torch.ones_like(center).flatten(),
        None,
        True,
        False,
        False,
    )
    return total.view_as(center), product.view_as(center)


def input_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    # (grad - total / count - (x - center) * product / count) * scale
    divisor = torch.where(scale.abs() < _TINY, _TINY, scale)
    result = torch.batch_norm_backward_elemt(
        _rows(grad),
        _rows(x),
        center.flatten(),
        torch.ones_like(center).flatten(),
        divisor.flatten(),
        (-offset / divisor).flatten(),
        (-slope / divisor).flatten(),
        torch.ones(1, dtype=torch.int32, device=x.device),
    )
    return _unflatten(result, x)


def _rows(x: Tensor) -> Tensor:
    # channels_last has no such view: a copy, which costs a pass.
    return x.reshape(1, x.shape[0] * x.shape[1], -1)


def _unflatten(rows: Tensor, x: Tensor) -> Tensor:
    # A view would break the in-place ReLU that follows.
    result = torch.ops.aten._unsafe_view(rows, x.shape)
    return result.contiguous(memory_format=memory_format(x))
