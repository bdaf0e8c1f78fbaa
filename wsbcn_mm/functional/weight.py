"""Functions of convolution weights: their coefficients, and the weights."""

import torch
from torch import Tensor


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

    Example:
        >>> weight = standardize_weight(torch.randn(8, 4, 3, 3))
        >>> bool(weight.flatten(1).std(1).sub(1).abs().max() < 1e-3)
        True
    """
    if torch.compiler.is_compiling():
        return _definition(weight, eps)
    return _StandardizeWeight.apply(weight, eps)


def _moments(weight: Tensor):
    flat = weight.flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    centered = flat - flat.mean(1, keepdim=True)
    return centered, centered.square().sum(1, keepdim=True) / (
        flat.shape[1] - 1
    )


def _definition(weight: Tensor, eps: float) -> Tensor:
    centered, var = _moments(weight)
    # The square root has no gradient at 0: a constant filter takes none.
    positive = var > 0
    std = torch.where(positive, var, 1).sqrt() * positive
    return (centered / (std + eps)).view_as(weight).to(weight.dtype)


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, eps):
        ctx.save_for_backward(weight)
        ctx.eps = eps
        return _definition(weight, eps)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient of gradients
            return torch.autograd.grad(
                _definition(weight, ctx.eps), weight, grad, create_graph=True
            )[0], None
        centered, var = _moments(weight)
        std = var.sqrt()
        inverse = 1 / (std + ctx.eps)
        g = grad.flatten(1).to(centered.dtype) * inverse
        # d std = <centered, d centered> / (std * (fan_in - 1))
        slope = (
            (g * centered).sum(1, keepdim=True)
            * inverse
            / (std * (centered.shape[1] - 1))
        )
        slope = torch.where(var > 0, slope, 0)
        g = g - g.mean(1, keepdim=True) - slope * centered
        return g.view_as(weight).to(weight.dtype), None
