"""Functions of convolution weights."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from . import kernels
from .transforms import is_transformed

# Added to variances: the least whose inverse root, cubed, is a float32.
_TINY = 1e-24


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
    rows = filter_rows(weight)
    centered = rows - rows.mean(1, keepdim=True)
    var = centered.square().sum(1, keepdim=True) / (rows.shape[1] - 1)
    # The square root has no gradient at 0: a constant filter takes none.
    positive = var > 0
    std = torch.where(positive, var, 1).sqrt() * positive
    return (centered / (std + eps)).view(weight.shape).to(weight.dtype)


class _StandardizeWeight(torch.autograd.Function):
    r"""PyTorch's normalizations, of filters: one pass each way.

    Group Normalization, with a group a filter, gives :math:`z = c / \sigma`
    with the centred weight :math:`c` and the biased :math:`\sigma`. Ours, with
    the unbiased :math:`s = \sigma \sqrt{K / (K - 1)}` over K weights, is a
    factor a filter away:

    .. math::
        \hat W = \frac{c}{s + \epsilon} = \frac{z}{\sqrt{K / (K - 1)} +
        \epsilon / \sigma}

    The backward pass of Batch Normalization, with a channel a filter, is

    .. math::
        \gamma r (g - \mathrm{mean}(g)) - \gamma r^3 c \langle g, c \rangle
        / K

    for any :math:`r` in the place of :math:`1 / \sigma`. With :math:`i = 1 /
    (s + \epsilon)` ours is :math:`i (g - \mathrm{mean}(g)) - i^2 c \langle
    g, c \rangle / (s (K - 1))`: the same for :math:`r^2 = i K / (s (K - 1))`
    and :math:`\gamma = i / r`.
    """

    @staticmethod
    def forward(ctx, weight, eps):
        rows = _memory_rows(weight)
        filters, count = rows.shape
        result, mean, inverse = torch.native_group_norm(
            rows[None], None, None, 1, filters, count, filters, _TINY
        )
        factor = (inverse * eps).add_((count / (count - 1)) ** 0.5)
        result *= factor.reciprocal()[..., None]
        ctx.save_for_backward(weight, mean, inverse, factor)
        ctx.eps = eps
        return _unflatten(result, weight)

    @staticmethod
    def backward(ctx, grad):
        weight, mean, inverse, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient of gradients
            return torch.autograd.grad(
                _definition(weight, ctx.eps), weight, grad, create_graph=True
            )[0], None
        rows = _memory_rows(weight)
        count = rows.shape[1]
        # i = inverse / factor, s = sqrt(count / (count - 1)) / inverse
        ratio = (count / (count - 1)) ** 0.25 * factor.rsqrt()
        result, _, _ = torch.ops.aten.native_batch_norm_backward(
            _memory_rows(grad, like=weight)[None],
            rows[None],
            weight=(ratio * factor).reciprocal_()[0],
            running_mean=None,
            running_var=None,
            save_mean=mean[0],
            save_invstd=(inverse * ratio)[0],
            train=True,
            eps=0.0,
            output_mask=[True, False, False],
        )
        return _unflatten(result, weight), None


def _layout(weight: Tensor) -> Tuple[int, ...]:
    """The order of dimensions in memory, the filters first."""
    order = range(1, weight.dim())
    return (0, *sorted(order, key=lambda d: (-weight.stride(d), d)))


def _memory_rows(weight: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """:func:`filter_rows` in the order of memory: a view in any layout."""
    like = weight if like is None else like
    if like.is_contiguous():
        return filter_rows(weight)
    return filter_rows(weight.permute(_layout(like)))


def _unflatten(rows: Tensor, weight: Tensor) -> Tensor:
    if weight.is_contiguous():
        return rows.view(weight.shape).to(weight.dtype)
    order = _layout(weight)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    rows = rows.view([weight.shape[d] for d in order]).permute(inverse)
    return rows.to(weight.dtype)


def filter_rows(weight: Tensor) -> Tensor:
    """One filter a row, in the dtype of statistics."""
    return weight.flatten(1).to(kernels.statistics_dtype(weight.dtype))
