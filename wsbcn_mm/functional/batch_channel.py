"""Batch-Channel Normalization's coefficients, and their gradient."""

from dataclasses import dataclass
from typing import Optional, Tuple

from torch import Tensor

from . import kernels
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
            mean, var, *parameters, **self._constants()
        )

    def vjp(
        self, mean: Tensor, var: Tensor, *parameters: Tensor
    ) -> kernels.Gradient:
        """``scale``, ``shift``, and from their gradients those of the rest."""
        return kernels.select(mean).batch_channel(
            mean, var, *parameters, **self._constants()
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        *parameters: Tensor,
    ) -> Optional[Tuple[Tensor, ...]]:
        """The gradients of ``x`` and of the parameters, all at once.

        None where no kernel does that for such an ``x``.
        """
        kernel = kernels.select(x)
        if not hasattr(kernel, 'batch_channel_backward'):
            return None
        return kernel.batch_channel_backward(
            grad, x, mean, var, *parameters, **self._constants()
        )

    def _constants(self) -> dict:
        # Not vars(self), which torch.compile does not follow.
        return dict(
            running_mean=self.running_mean,
            running_var=self.running_var,
            num_groups=self.num_groups,
            eps=self.eps,
        )
