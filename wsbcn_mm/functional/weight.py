"""Functions of convolution weights."""

from typing import Tuple

import torch
from torch import Tensor

from . import kernels
from .transforms import is_transformed


def standardize_weight(
    weight: Tensor, eps: float = 1e-5, eps_inside_sqrt: bool = False
) -> Tensor:
    r"""Weight Standardization of every output channel.

    .. math::
        \hat W_o = \frac{W_o - \mathrm{mean}(W_o)}{\mathrm{std}(W_o) +
        \epsilon}

    with the unbiased standard deviation over the fan-in, as in `Micro-Batch
    Training with Batch-Channel Normalization and Weight Standardization
    <https://arxiv.org/abs/1903.10520>`_ and in mmcv. A constant filter gives
    zeros and a finite gradient. With ``eps_inside_sqrt`` the divisor is
    :math:`\sqrt{\mathrm{var}(W_o) + \epsilon}`.

    Args:
        weight (Tensor): A convolution's weight.
        eps (float): Added to the standard deviation. Default: 1e-5
        eps_inside_sqrt (bool): Whether to add ``eps`` to the variance
            instead, inside the square root. Default: False

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
    eps_pair = _eps_pair(eps, eps_inside_sqrt)
    if is_transformed(weight):
        return kernels.plain.standardized(weight, *eps_pair)
    return _StandardizeWeight.apply(weight, *eps_pair)


def _eps_pair(eps: float, inside_sqrt: bool) -> Tuple[float, float]:
    """Return what is added to the variance, and to the deviation."""
    return (eps, 0.0) if inside_sqrt else (0.0, eps)


def _vjp(
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    eps_inside_sqrt: bool = False,
):
    return kernels.select(weight).standardize_weight(
        weight, *_eps_pair(eps, eps_inside_sqrt), dtype
    )


standardize_weight.vjp = _vjp


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, var_eps, std_eps):
        backend = kernels.select(weight)
        result, ctx.pull_back = backend.standardize_weight(
            weight, var_eps, std_eps, weight.dtype
        )
        ctx.save_for_backward(weight)
        ctx.eps_pair = var_eps, std_eps
        return result

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient of gradients
            result = kernels.plain.standardized(weight, *ctx.eps_pair)
            (grad,) = torch.autograd.grad(
                result, weight, grad, create_graph=True
            )
        else:
            grad = ctx.pull_back(grad)
        return grad, None, None
