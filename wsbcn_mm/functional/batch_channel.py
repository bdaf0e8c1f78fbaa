"""Batch-Channel Normalization: coefficients, their gradient, a forward."""

import math
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from torch import Tensor

from . import kernels
from .coefficients import (
    Statistics,
    batch_channel_coefficients,
    batch_statistics,
    large_batch_channel_coefficients,
)
from .engine import differentiable_backward, wants_graph
from .gradient_statistics import Average, fitted, subtract_fit
from .transforms import is_transformed
from .vjp import vjp_of


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


@dataclass(eq=False)
class AveragedGradientCoefficients(BatchChannelCoefficients):
    """Micro-batch coefficients with Batch Normalization's gradient.

    The forward pass is that of :class:`BatchChannelCoefficients`. The
    backward pass subtracts a fit to the last images from the gradient of the
    input: see :mod:`wsbcn_mm.functional.gradient_statistics`.

    Args:
        average (Callable): Called in the backward pass with the statistics of
            the call's images, shape (N, 4, C). Returns the statistics of all
            images to fit to, shape (4, C). Kernels that fit by themselves use
            its methods ``history`` and ``update`` instead, where its
            attribute ``is_local`` is True.
        length (int): Positions of an image.
    """

    average: Average
    length: int

    def __call__(
        self, mean: Tensor, var: Tensor, *parameters: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """``scale`` and ``shift``: batch weight and bias, weight and bias."""
        constants = self._constants()
        running_mean, running_var = _AveragedEstimates.apply(
            mean,
            var,
            constants.pop('running_mean'),
            constants.pop('running_var'),
            self._fit(),
        )
        return batch_channel_coefficients(
            mean,
            var,
            *parameters,
            running_mean=running_mean,
            running_var=running_var,
            **constants,
        )

    def vjp(
        self, mean: Tensor, var: Tensor, *parameters: Tensor
    ) -> kernels.Gradient:
        """``scale``, ``shift``, and from their gradients those of the rest."""
        scale, shift, pull_back = super().vjp(mean, var, *parameters)
        return scale, shift, fitted(pull_back, scale, mean, var, **self._fit())

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        *parameters: Tensor,
    ) -> Optional[Tuple[Tensor, ...]]:
        """The gradients of ``x`` and of the parameters, all at once.

        None where no kernel does that for such an ``x``, or where the images
        are those of several processes.
        """
        kernel = kernels.select(x)
        if not (
            getattr(kernel, 'averages_gradients', False)
            and getattr(self.average, 'is_local', False)
        ):
            return None
        return kernel.batch_channel_backward(
            grad,
            x,
            mean,
            var,
            *parameters,
            average=self.average,
            **self._constants(),
        )

    def _fit(self) -> dict:
        return dict(eps=self.eps, length=self.length, average=self.average)


class _AveragedEstimates(torch.autograd.Function):
    """Estimates for every image, with a gradient to its moments."""

    @staticmethod
    def forward(ctx, mean, var, running_mean, running_var, settings):
        ctx.save_for_backward(mean, var, running_mean, running_var)
        ctx.settings = settings
        return tuple(
            t.expand_as(mean).clone() for t in (running_mean, running_var)
        )

    @staticmethod
    def backward(ctx, grad_running_mean, grad_running_var):
        if torch.is_grad_enabled():
            raise RuntimeError(
                'BCN with grad_averaging has no gradient of its gradient '
                '(create_graph=True): set grad_averaging=None'
            )
        mean, var, running_mean, running_var = ctx.saved_tensors
        # Sums of g and of g * (x - mu), for it is (x - mu) / sigma.
        grad_mean = -grad_running_mean
        total = -2 * (running_var + ctx.settings['eps']) * grad_running_var
        to_mean, to_var = subtract_fit(
            grad_mean,
            total - (mean - running_mean) * grad_mean,
            mean,
            var,
            **ctx.settings,
        )
        return to_mean, to_var, None, None, None


@dataclass(eq=False)
class LargeBatchChannelCoefficients:
    r"""The same with the batch's own statistics, and gradients through them.

    In the notation of :class:`BatchChannelCoefficients`, with sums over the
    samples,

    .. math::
        \bar \mu = -a \sum_n \bar m', \qquad
        \overline{\sigma^2} = -\tfrac12 \frac{a}{\sigma^2 + \epsilon}
        \sum_n \bar a

    Args:
        num_groups (int): Number of channel groups.
        eps (float): Added to both variances.
        statistics (Callable): From moments to the batch's mean and variance
            of each channel. Without a ``vjp`` autograd differentiates it.
            Default: :func:`batch_statistics`
    """

    num_groups: int
    eps: float
    statistics: Statistics = batch_statistics

    def __call__(
        self, mean: Tensor, var: Tensor, *parameters: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """``scale`` and ``shift``: batch weight and bias, weight and bias."""
        return large_batch_channel_coefficients(
            mean,
            var,
            *parameters,
            num_groups=self.num_groups,
            eps=self.eps,
            statistics=self.statistics,
        )

    def vjp(
        self, mean: Tensor, var: Tensor, *parameters: Tensor
    ) -> kernels.Gradient:
        """``scale``, ``shift``, and from their gradients those of the rest."""
        batch_mean, batch_var, to_moments = vjp_of(self.statistics)(mean, var)
        scale, shift, of_the_rest = kernels.select(mean).batch_channel(
            mean,
            var,
            *parameters,
            running_mean=batch_mean,
            running_var=batch_var,
            num_groups=self.num_groups,
            eps=self.eps,
        )

        def pull_back(grad_scale: Tensor, grad_shift: Tensor):
            grad_mean, grad_var, *grads = of_the_rest(grad_scale, grad_shift)
            inverse_std = (batch_var + self.eps).rsqrt()
            a = parameters[0] * inverse_std
            through_mean, through_var = to_moments(
                -a * grads[1], -0.5 * a * inverse_std * grads[0]
            )
            return grad_mean + through_mean, grad_var + through_var, *grads

        return scale, shift, pull_back


def micro_batch_coefficients(
    running_mean: Tensor,
    running_var: Tensor,
    num_groups: int,
    eps: float,
    average: Optional[Average] = None,
    length: int = 1,
) -> BatchChannelCoefficients:
    """Coefficients with estimates, which may have an averaged gradient.

    Args:
        running_mean, running_var (Tensor): The estimates, shape (C,).
        num_groups (int): Number of channel groups.
        eps (float): Added to both variances.
        average (Callable | None), length (int): See
            :class:`AveragedGradientCoefficients`. Default: None, for estimates
            that are constants.
    """
    constants = running_mean, running_var, num_groups, eps
    if average is None:
        return BatchChannelCoefficients(*constants)
    return AveragedGradientCoefficients(*constants, average, length)


def learn_and_normalize(
    x: Tensor,
    *parameters: Tensor,
    num_groups: int,
    eps: float,
    estimate: bool = True,
    average: Optional[Average] = None,
    **estimates,
) -> Optional[Tensor]:
    """A training forward that moves estimates, all at once.

    It counts the forward, moves the estimates, and normalizes.

    Args:
        x (Tensor): Activations.
        *parameters (Tensor): Batch weight and bias, weight and bias.
        num_groups (int): Number of channel groups.
        eps (float): Added to both variances.
        estimate (bool): Whether the moved estimates are what is normalized
            with, as :class:`BatchChannelCoefficients` does, or the statistics
            of the batch, as :class:`LargeBatchChannelCoefficients` does; then
            the estimate of the variance is moved towards the unbiased one.
            Default: True
        average (Callable | None): See :class:`AveragedGradientCoefficients`.
        **estimates: ``running_mean``, ``running_var`` and ``count``, which
            are moved in place, and the ``momentum`` and ``annealing`` of
            :func:`rate_of_forward`.

    Returns:
        Tensor | None: None where no kernel does that for such an ``x``; then
        nothing was moved.
    """
    if is_transformed(x, *parameters):
        return None
    kernel = kernels.select(x)
    running = estimates['running_mean'], estimates['running_var']
    if not hasattr(kernel, 'batch_channel_forward') or not all(
        t.is_contiguous() for t in running
    ):
        return None
    settings = dict(num_groups=num_groups, eps=eps, estimate=estimate)
    if wants_graph(x, *parameters):
        result = _LearnAndNormalize.apply(
            x, kernel, estimates, settings, average, *parameters
        )
    else:
        result, _ = kernel.batch_channel_forward(
            x, *parameters, **estimates, **settings
        )
    for t in running:
        if not t.is_inference():  # autograd knows nothing of it
            torch.autograd.graph.increment_version(t)
    return result


class _LearnAndNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, estimates, settings, average, *parameters):
        result, ctx.small = kernel.batch_channel_forward(
            x, *parameters, **estimates, **settings
        )
        ctx.save_for_backward(x, *parameters)
        ctx.kernel, ctx.settings, ctx.average = kernel, settings, average
        return result

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        mean, var, used_mean, used_var = ctx.small
        settings = ctx.settings
        wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
        constants = settings['num_groups'], settings['eps']
        if settings['estimate']:
            coefficients = micro_batch_coefficients(
                used_mean,
                used_var,
                *constants,
                ctx.average,
                max(math.prod(x.shape[2:]), 1),
            )
        else:
            coefficients = LargeBatchChannelCoefficients(*constants)
        if torch.is_grad_enabled():  # create_graph: a gradient of gradients
            grads = differentiable_backward(
                grad, x, parameters, coefficients, wanted
            )
        elif ctx.average is not None:
            mean, var = (t.view(x.shape[:2]) for t in (mean, var))
            scale, _, pull_back = coefficients.vjp(mean, var, *parameters)
            grads = kernels.backward(
                ctx.kernel, grad, x, mean, scale, pull_back, wanted[0]
            )
        else:
            grads = ctx.kernel.batch_channel_backward(
                grad,
                x,
                mean,
                var,
                *parameters,
                running_mean=used_mean,
                running_var=used_var,
                **settings,
            )
        return grads[0], None, None, None, None, *grads[1:]
