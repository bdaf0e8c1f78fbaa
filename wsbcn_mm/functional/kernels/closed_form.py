"""Batch-Channel Normalization's coefficients, differentiated by hand.

:class:`wsbcn_mm.functional.BatchChannelCoefficients` has the formulas.
"""

from typing import Callable, Tuple

import torch
from torch import Tensor

Gradient = Tuple[
    Tensor, Tensor, Callable[[Tensor, Tensor], Tuple[Tensor, ...]]
]


def batch_channel(
    mean: Tensor,
    var: Tensor,
    batch_weight: Tensor,
    batch_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    num_groups: int,
    eps: float,
) -> Gradient:
    """Coefficients, and the function that pulls gradients of them back.

    Args:
        mean, var (Tensor): Moments, shape (N, C).
        batch_weight, batch_bias, weight, bias (Tensor): The parameters.
        running_mean, running_var (Tensor): The estimates, shape (C,).
        num_groups (int): Number of channel groups.
        eps (float): Added to both variances.

    Returns:
        tuple: ``scale``, ``shift``, and a function from their gradients to
        those of the moments and the parameters.
    """
    samples, channels = mean.shape
    shape = samples, num_groups, channels // num_groups
    # One row of a group affine or of channels: (G, 1) or (G, C / G).
    gamma = weight.view(num_groups, -1)
    inverse_std = (running_var + eps).rsqrt_()
    a = batch_weight * inverse_std
    moved = (mean - running_mean).view(shape)
    a_rows, var_rows = a.view(shape[1:]), var.view(shape)
    centered = torch.addcmul(batch_bias.view(shape[1:]), moved, a_rows)
    # Sums, since torch takes twice as long for a small mean.
    centered.sub_(centered.sum(2, True), alpha=1 / shape[2])
    a_var = a_rows * var_rows
    group_var = torch.addcmul(centered.square(), a_var, a_rows)
    q = group_var.sum(2, True).div_(shape[2]).add_(eps).rsqrt_()
    p = gamma * q
    scale = p * a_rows
    shift = torch.addcmul(bias.view(num_groups, -1), centered, p)

    def pull_back(grad_scale: Tensor, grad_shift: Tensor):
        grad_scale, grad_shift = (
            t.view(shape) for t in (grad_scale, grad_shift)
        )
        grad_p = torch.addcmul(a_rows * grad_scale, centered, grad_shift)
        if gamma.shape[1] == 1:
            grad_p = grad_p.sum(2, True)
        grad_gamma = (grad_p * q).sum(0)
        grad_p = grad_p * gamma
        if gamma.shape[1] > 1:
            grad_p = grad_p.sum(2, True)
        # 2 / k times the gradient of the group's variance
        grad_var = grad_p.mul_(q.pow(3)).mul_(-1 / shape[2])
        through_p = p * grad_shift
        through_p.sub_(through_p.sum(2, True), alpha=1 / shape[2])
        grad_mean = through_p.addcmul_(centered, grad_var)
        grad_a = torch.addcmul(p * grad_scale, a_var, grad_var)
        grad_a.addcmul_(moved, grad_mean)
        grad_bias = grad_shift.sum(0)
        if gamma.shape[1] == 1:
            grad_bias = grad_bias.sum(1)
        return (
            (a_rows * grad_mean).view_as(mean),
            (a_rows.square() * grad_var).mul_(0.5).view_as(mean),
            grad_a.sum(0).flatten().mul_(inverse_std),
            grad_mean.sum(0).flatten(),
            grad_gamma.flatten(),
            grad_bias.flatten(),
        )

    return scale.view_as(mean), shift.view_as(mean), pull_back
