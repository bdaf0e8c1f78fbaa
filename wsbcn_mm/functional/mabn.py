"""Moving Average Batch Normalization: coefficients with their own backward."""

from typing import Callable, Tuple

import torch
from torch import Tensor


def moving_average_coefficients(
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    length: int,
    mean_square: Tensor,
    ratio: Tensor,
    eps: float,
    average: Callable[[Tensor], Tensor],
) -> Tuple[Tensor, Tensor]:
    r"""Moving Average Batch Normalization in training.

    .. math::
        z = \frac{x}{\sqrt{\chi^2 + \epsilon}}, \qquad
        y = \gamma r z + \beta

    Were :math:`\chi^2` the batch's own mean square, its gradient would be
    :math:`(g - z \psi) / \sqrt{\chi^2 + \epsilon}` with :math:`g = \gamma r
    \, \partial L / \partial y` and :math:`\psi = \mathrm{mean}(g z)`. That
    is the gradient taken, with a moving average in the place of
    :math:`\psi`. The ratio :math:`r` is a constant.

    Args:
        mean, var (Tensor): Moments of the input, shape (N, C).
        weight, bias (Tensor): :math:`\gamma, \beta`, shape (C,).
        length (int): Positions of a sample that the moments are over.
        mean_square (Tensor): :math:`\chi^2`, shape (C,).
        ratio (Tensor): :math:`r`, shape (C,).
        eps (float): Added to the mean square.
        average (Callable): Called in the backward pass with the batch's sum
            of :math:`g z`, shape (C,), for the :math:`\psi` to use.
    """
    # Sum of x^2: what the gradient goes through, whatever moving average
    # is normalized by.
    energy = (var + mean.square()).sum(0) * length
    scale = _Scale.apply(energy, weight, mean_square, ratio, eps, average)
    scale = scale.expand_as(mean)
    return scale, mean * scale + bias


class _Scale(torch.autograd.Function):
    """``weight * ratio / sqrt(mean_square + eps)`` with MABN's gradient."""

    @staticmethod
    def forward(ctx, energy, weight, mean_square, ratio, eps, average):
        inverse_std = (mean_square + eps).rsqrt()
        ctx.save_for_backward(weight, inverse_std, ratio)
        ctx.average = average
        return weight * ratio * inverse_std

    @staticmethod
    def backward(ctx, grad):
        weight, inverse_std, ratio = ctx.saved_tensors
        grad_weight = grad * ratio * inverse_std  # grad: sum of x * dL/dy
        psi = ctx.average(grad_weight * weight)
        # d energy = 2 x dx, so dL/dx gets -x psi / (mean_square + eps).
        grad_energy = psi * inverse_std.square() / -2
        return grad_energy, grad_weight, None, None, None, None
