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
    rows = _rows(weight)
    centered = rows - rows.mean(1, keepdim=True)
    return centered, centered.square().sum(1, keepdim=True) / (
        rows.shape[1] - 1
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


def centralize_weight(weight: Tensor) -> Tensor:
    r"""Subtract the mean of every output channel.

    .. math::
        \hat W_o = W_o - \mathrm{mean}(W_o)

    As in `Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization <https://arxiv.org/abs/2001.06838>`_.

    Args:
        weight (Tensor): A convolution's weight.

    Shape:
        - weight, result: :math:`(C_{out}, C_{in} / groups, *)`

    Example:
        >>> weight = centralize_weight(torch.randn(8, 4, 3, 3))
        >>> bool(weight.flatten(1).mean(1).abs().max() < 1e-6)
        True
    """
    centered = _rows(weight)
    centered = centered - centered.mean(1, keepdim=True)
    return centered.view(weight.shape).to(weight.dtype)


def normalize_weight(
    weight: Tensor, gain: Tensor, eps: float = 1e-5, centered: bool = False
) -> Tensor:
    r"""Weight Normalization of every output channel.

    .. math::
        \hat W_o = g_o \frac{V_o}{\max(\|V_o\|, \epsilon)}

    with :math:`V = W`, as in `Weight Normalization
    <https://arxiv.org/abs/1602.07868>`_, or :math:`V_o = W_o -
    \mathrm{mean}(W_o)`, as in `Centered Weight Normalization
    <https://openaccess.thecvf.com/content_iccv_2017/html/
    Huang_Centered_Weight_Normalization_ICCV_2017_paper.html>`_. The smallest
    norm gives a filter of zeros a finite gradient.

    Args:
        weight (Tensor): A convolution's weight.
        gain (Tensor): :math:`g`, shape (C_out,).
        eps (float): The smallest norm to divide by. Default: 1e-5
        centered (bool): Whether to subtract means first. Default: False

    Shape:
        - weight, result: :math:`(C_{out}, C_{in} / groups, *)`

    Example:
        >>> weight = normalize_weight(torch.randn(8, 4, 3, 3), torch.ones(8))
        >>> bool(weight.flatten(1).norm(dim=1).sub(1).abs().max() < 1e-6)
        True
    """
    rows = _rows(weight)
    if centered:
        rows = rows - rows.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    scale = gain.to(rows.dtype).view(-1, 1) / norm.clamp(min=eps)
    return (rows * scale).view(weight.shape).to(weight.dtype)


def _rows(weight: Tensor) -> Tensor:
    """One filter a row, in the dtype of statistics."""
    flat = weight.flatten(1)
    return flat if flat.dtype == torch.float64 else flat.float()
