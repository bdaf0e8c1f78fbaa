"""Functions of convolution weights."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from . import kernels
from .transforms import is_transformed


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Weight Standardization of every output channel.

    .. math::
        \hat W_o = \frac{W_o - \mathrm{mean}(W_o)}{\mathrm{std}(W_o) +
        \epsilon}

    with the unbiased standard deviation over the fan-in, as in `Micro-Batch
    Training with Batch-Channel Normalization and Weight Standardization
    <https://arxiv.org/abs/1903.10520>`_ and in mmcv. A constant filter gives
    zeros and a finite gradient.

    Args:
        weight (Tensor): A convolution's weight.
        eps (float): Added to the standard deviation. Default: 1e-5

    Shape:
        - weight, result: :math:`(C_{out}, C_{in} / groups, *)`

    Raises:
        ValueError: If a filter has fewer than two weights.

    Example:
        >>> weight = standardize_weight(torch.randn(8, 4, 3, 3))
        >>> bool(weight.flatten(1).std(1).sub(1).abs().max() < 1e-3)
        True
    """
    if weight.dim() < 2 or weight[0].numel() < 2:
        raise ValueError(
            'standardize_weight: a filter needs at least two weights to have '
            f'a standard deviation, got a weight of shape '
            f'{tuple(weight.shape)}'
        )
    if is_transformed(weight):
        return _definition(weight, eps)
    return _StandardizeWeight.apply(weight, eps)


def _definition(weight: Tensor, eps: float) -> Tensor:
    rows = _rows(weight)
    centered = rows - rows.mean(1, keepdim=True)
    var = centered.square().sum(1, keepdim=True) / (rows.shape[1] - 1)
    # The square root has no gradient at 0: a constant filter takes none.
    positive = var > 0
    std = torch.where(positive, var, 1).sqrt() * positive
    return (centered / (std + eps)).view(weight.shape).to(weight.dtype)


class _StandardizeWeight(torch.autograd.Function):
    """The passes of the activations' engine: filters are its channels."""

    @staticmethod
    def forward(ctx, weight, eps):
        rows = _memory_rows(weight)
        kernel = kernels.select(rows)
        mean, var = kernel.moments(rows)
        std = (var * (rows.shape[2] / (rows.shape[2] - 1))).sqrt_()
        inverse = (std + eps).reciprocal_()
        ctx.near = kernels.near(mean, var)
        result = kernel.affine(
            rows, mean, inverse, torch.zeros_like(mean), near=ctx.near
        )
        ctx.save_for_backward(weight, mean, std, inverse)
        ctx.eps = eps
        return _unflatten(result, weight)

    @staticmethod
    def backward(ctx, grad):
        weight, mean, std, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient of gradients
            return torch.autograd.grad(
                _definition(weight, ctx.eps), weight, grad, create_graph=True
            )[0], None
        rows = _memory_rows(weight)
        grad = _memory_rows(grad, like=weight)
        kernel = kernels.select(rows)
        count = rows.shape[2]
        total, product = kernel.reduce(grad, rows, mean)
        # d std = <centered, d centered> / (std * (fan_in - 1))
        slope = -product * inverse.square() / (std * (count - 1))
        slope = torch.where(std > 0, slope, 0)
        result = kernel.input_grad(
            grad,
            rows,
            mean,
            inverse,
            slope,
            inverse * total / -count,
            near=ctx.near,
        )
        return _unflatten(result, weight), None


def _layout(weight: Tensor) -> Tuple[int, ...]:
    """The order of dimensions in memory, the filters first."""
    order = range(1, weight.dim())
    return (0, *sorted(order, key=lambda d: (-weight.stride(d), d)))


def _memory_rows(weight: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """Filters as the channels of activations, a view in any layout."""
    order = _layout(weight if like is None else like)
    return weight.permute(order).flatten(1)[None]


def _unflatten(rows: Tensor, weight: Tensor) -> Tensor:
    order = _layout(weight)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rows.view([weight.shape[d] for d in order]).permute(inverse)


def _rows(weight: Tensor) -> Tensor:
    """One filter a row, in the dtype of statistics."""
    return weight.flatten(1).to(kernels.statistics_dtype(weight.dtype))
