"""The weights that Weight Standardization is compared with."""

import torch
from torch import Tensor

from .kernels.plain import filter_rows


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
    centered = filter_rows(weight)
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
    rows = filter_rows(weight)
    if centered:
        rows = rows - rows.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    scale = gain.to(rows.dtype).view(-1, 1) / norm.clamp(min=eps)
    return (rows * scale).view(weight.shape).to(weight.dtype)
