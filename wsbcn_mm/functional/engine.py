"""Moments, coefficients, one affine: what every normalizer here is made of.

A normalizer is a function ``coefficients(mean, var, *parameters)`` from the
per-sample, per-channel moments of its input to a ``scale`` and a ``shift`` of
the same (N, C) shape. Its output is ``(x - mean) * scale + shift``. So a
forward pass reads the activations twice and writes them once, a backward pass
reads them four times (gradient and input, for two sums and for the result)
and writes them once, and all that is saved for it is the input and small
tensors.

``x`` stays centred at its own mean throughout, because ``x * scale + shift``
would lose all its digits where the mean is large against the spread.
"""

from typing import Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import kernels
from .transforms import is_transformed
from .vjp import vjp_of

Coefficients = Callable[..., Tuple[Tensor, Tensor]]


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    r"""Mean and biased variance of each sample's channels.

    .. math::
        m_{nc} = \frac1L \sum_l x_{ncl}, \qquad
        v_{nc} = \frac1L \sum_l (x_{ncl} - m_{nc})^2

    The result carries no gradient: :func:`normalize` knows that its moments
    are those of its input.

    Args:
        x (Tensor): Activations, floating point.

    Shape:
        - x: :math:`(N, C, *)`
        - mean, var: :math:`(N, C)`, float64 for float64 and else float32

    Example:
        >>> mean, var = moments(torch.tensor([[[1., 3.]]]))
        >>> mean, var
        (tensor([[2.]]), tensor([[1.]]))
    """
    return kernels.select(x).moments(x.detach())


def moved_estimates(
    mean: Tensor, var: Tensor, **settings
) -> Tuple[Tensor, Tensor]:
    """Estimates after a batch with these moments.

    Args:
        mean, var (Tensor): ``moments(x)``.
        **settings: Those of :func:`estimates.estimates_from_moments`, which
            is the definition.
    """
    return kernels.select(mean).moved_estimates(mean, var, **settings)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    coefficients: Coefficients,
    *parameters: Tensor,
) -> Tensor:
    r"""Normalize with coefficients that are functions of the moments.

    .. math::
        (s, t) = \mathrm{coefficients}(m, v, \theta_1, \theta_2, ...), \qquad
        y_{ncl} = s_{nc} (x_{ncl} - m_{nc}) + t_{nc}

    Gradients flow to ``x``, through the moments too, and to the parameters.

    Args:
        x (Tensor): Activations, floating point.
        mean, var (Tensor): ``moments(x)``.
        coefficients (Callable): A differentiable, pure function of the
            moments and the parameters to ``(scale, shift)``. With a method
            ``vjp`` (:class:`BatchChannelCoefficients` has one) it is not
            differentiated by autograd, and with one ``backward`` neither are
            the passes of a backward taken one by one.
        *parameters (Tensor): What the coefficients depend on besides.

    Shape:
        - x, result: :math:`(N, C, *)`, of one dtype and memory format
        - mean, var, scale, shift: :math:`(N, C)`

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> def instance_norm(mean, var, weight):
        ...     return weight * (var + 1e-5).rsqrt(), torch.zeros_like(mean)
        >>> y = normalize(x, *moments(x), instance_norm, torch.ones(3))
        >>> torch.allclose(y, torch.nn.functional.instance_norm(x), atol=1e-5)
        True
    """
    if is_transformed(x, *parameters):
        return _definition(x, coefficients, *parameters)
    if wants_graph(x, *parameters):
        return _Normalize.apply(x, mean, var, coefficients, *parameters)
    forward = getattr(coefficients, 'vjp', coefficients)
    scale, shift = forward(mean, var, *parameters)[:2]
    return kernels.select(x).affine(x, mean, scale, shift)


def _definition(
    x: Tensor, coefficients: Coefficients, *parameters: Tensor
) -> Tensor:
    mean, var = kernels.plain.moments(x)
    scale, shift = coefficients(mean, var, *parameters)
    return kernels.plain.affine(x, mean, scale, shift)


def wants_graph(*tensors: Tensor) -> bool:
    """Whether a result of these is to be differentiated."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Normalize(torch.autograd.Function):
    """The three passes of a backward, instead of autograd's many."""

    @staticmethod
    def forward(ctx, x, mean, var, coefficients, *parameters):
        vjp = vjp_of(coefficients)
        scale, shift, ctx.pull_back = vjp(mean, var, *parameters)
        # Parameters, to be told if one is edited before the backward pass.
        ctx.save_for_backward(x, *parameters)
        ctx.coefficients = coefficients
        ctx.mean, ctx.var, ctx.scale = mean, var, scale
        return kernels.select(x).affine(x, mean, scale, shift)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():  # create_graph: a gradient of gradients
            grads = differentiable_backward(
                grad, x, parameters, ctx.coefficients, wanted
            )
            return grads[0], None, None, None, *grads[1:]
        if wanted[0] and hasattr(ctx.coefficients, 'backward'):
            grads = ctx.coefficients.backward(
                grad, x, ctx.mean, ctx.var, *parameters
            )
            if grads is not None:
                return grads[0], None, None, None, *grads[1:]
        grads = kernels.backward(
            kernels.select(x),
            grad,
            x,
            ctx.mean,
            ctx.scale,
            ctx.pull_back,
            wanted[0],
        )
        return grads[0], None, None, None, *grads[1:]


def differentiable_backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    coefficients: Coefficients,
    wanted: Sequence[bool],
) -> Tuple[Optional[Tensor], ...]:
    """The gradients that are wanted, of x and parameters, with a graph."""
    with torch.enable_grad():
        y = _definition(x, coefficients, *parameters)
        inputs = [t for t, w in zip((x, *parameters), wanted) if w]
        grads = iter(
            torch.autograd.grad(
                y, inputs, grad, create_graph=True, allow_unused=True
            )
        )
    return tuple(next(grads) if w else None for w in wanted)
