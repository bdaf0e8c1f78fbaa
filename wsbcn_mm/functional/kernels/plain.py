"""Plain PyTorch, for every device, dtype and layout: the definition."""

from typing import Callable, Tuple

import torch
from torch import Tensor

from ..estimates import estimates_from_moments as moved_estimates
from .closed_form import batch_channel

__all__ = [
    'affine',
    'batch_channel',
    'input_grad',
    'moments',
    'moved_estimates',
    'reduce',
    'standardize_weight',
    'standardized',
    'statistics_dtype',
]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision keeps its statistics in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _statistics(x: Tensor) -> Tensor:
    return x.to(statistics_dtype(x.dtype))


def _spatial(x: Tensor) -> Tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _expand(small: Tensor, x: Tensor) -> Tensor:
    return small[(..., *(None for _ in _spatial(x)))]


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    if x.numel() == 0:  # no position: torch would say NaN, and warn
        zero = _statistics(x.new_zeros(x.shape[:2]))
        return zero, zero.clone()
    # Two passes where one would do, since E[x^2] - E[x]^2 cancels
    # catastrophically when the mean is large.
    var, mean = torch.var_mean(_statistics(x), _spatial(x), correction=0)
    return mean, var


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = _statistics(x) - _expand(center, x)
    return torch.addcmul(_expand(shift, x), y, _expand(scale, x)).to(x.dtype)


def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    grad = _statistics(grad)
    centered = _statistics(x) - _expand(center, x)
    return grad.sum(_spatial(x)), (grad * centered).sum(_spatial(x))


def input_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    result = torch.addcmul(
        _expand(offset, x), _statistics(grad), _expand(scale, x)
    )
    centered = _statistics(x) - _expand(center, x)
    return torch.addcmul(result, centered, _expand(slope, x)).to(x.dtype)


def standardized(weight: Tensor, var_eps: float, std_eps: float) -> Tensor:
    """Return the standardized weight, by operations that autograd follows."""
    rows = filter_rows(weight)
    centered = rows - rows.mean(1, keepdim=True)
    var = centered.square().sum(1, keepdim=True) / (rows.shape[1] - 1)
    var = var + var_eps
    # The square root has no gradient at 0: a constant filter takes none.
    positive = var > 0
    std = torch.where(positive, var, 1).sqrt() * positive
    return (centered / (std + std_eps)).view(weight.shape).to(weight.dtype)


def standardize_weight(
    weight: Tensor, var_eps: float, std_eps: float, dtype: torch.dtype
) -> Tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the standardized weight, and what pulls its gradient back.

    Args:
        weight (Tensor): A convolution's weight.
        var_eps (float): Added to the variance, inside the square root.
        std_eps (float): Added to the standard deviation, outside the root.
        dtype (torch.dtype): Of the standardized weight.
    """
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        value = standardized(leaf, var_eps, std_eps).to(dtype)

    def pull_back(grad: Tensor) -> Tensor:
        return torch.autograd.grad(value, leaf, grad, retain_graph=True)[0]

    return value.detach(), pull_back


def filter_rows(weight: Tensor) -> Tensor:
    """One filter a row."""
    return _statistics(weight.flatten(1))
