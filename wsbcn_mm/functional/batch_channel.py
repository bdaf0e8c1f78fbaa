"""Batch-Channel Normalization's coefficients, differentiated by hand."""

from dataclasses import dataclass
from typing import Callable, Tuple

import torch
from torch import Tensor

from .coefficients import batch_channel_coefficients


@dataclass(eq=False)
class BatchChannelCoefficients:
    r"""Micro-batch coefficients for :func:`wsbcn_mm.functional.normalize`.

    Calling it is :func:`batch_channel_coefficients`, the definition.
    :meth:`vjp` is the same with a gradient in closed form: for tensors as
    small as these, what autograd spends on every operation is what costs.

    With the notation of the definition, :math:`m', v'` the moments after the
    first affine, :math:`M_g` and :math:`q_g = 1 / \sqrt{V_g + \epsilon}` those
    of the group, :math:`k` channels in it and :math:`p = \gamma q`:

    .. math::
        \text{scale} = p a, \qquad \text{shift} = (m' - M) p + \beta

    and for gradients :math:`S, T` of them

    .. math::
        \bar p &= a S + (m' - M) T, \qquad
        \bar V = -\tfrac12 q^3 \textstyle\sum_g \gamma \bar p \\
        \bar m' &= p T - \mathrm{mean}_g(p T) + \tfrac2k \bar V (m' - M),
        \qquad \bar v' = \tfrac1k \bar V \\
        \bar a &= p S + 2 a v \bar v' + (m - \mu) \bar m'

    Args:
        running_mean, running_var (Tensor): :math:`\mu, \sigma^2`, constants.
        num_groups (int): Number of channel groups.
        eps (float): Added to both variances.
    """

    running_mean: Tensor
    running_var: Tensor
    num_groups: int
    eps: float

    def __call__(
        self, mean: Tensor, var: Tensor, *parameters: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """``scale`` and ``shift``: batch weight and bias, weight and bias."""
        return batch_channel_coefficients(
            mean,
            var,
            *parameters,
            running_mean=self.running_mean,
            running_var=self.running_var,
            num_groups=self.num_groups,
            eps=self.eps,
        )

    def vjp(
        self,
        mean: Tensor,
        var: Tensor,
        batch_weight: Tensor,
        batch_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tuple[Tensor, ...]]]:
        """``scale``, ``shift``, and from their gradients those of the rest."""
        samples, channels = mean.shape
        shape = samples, self.num_groups, channels // self.num_groups
        # One row of a group affine or of channels: (G, 1) or (G, C / G).
        gamma = weight.view(self.num_groups, -1)
        inverse_std = (self.running_var + self.eps).rsqrt_()
        a = batch_weight * inverse_std
        moved = (mean - self.running_mean).view(shape)
        a_rows, var_rows = a.view(shape[1:]), var.view(shape)
        centered = torch.addcmul(batch_bias.view(shape[1:]), moved, a_rows)
        # Sums, since torch takes twice as long for a small mean.
        centered.sub_(centered.sum(2, True), alpha=1 / shape[2])
        a_var = a_rows * var_rows
        group_var = torch.addcmul(centered.square(), a_var, a_rows)
        q = group_var.sum(2, True).div_(shape[2]).add_(self.eps).rsqrt_()
        p = gamma * q
        scale = p * a_rows
        shift = torch.addcmul(bias.view(self.num_groups, -1), centered, p)

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
