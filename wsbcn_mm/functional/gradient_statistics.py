r"""Averaged statistics of the backward pass: pure functions of small tensors.

Batch Normalization's gradient has no part along a shift or a scaling of a
whole channel over its batch. With g the gradient that constants in the place
of the statistics would give, it is

.. math::
    \frac{\partial L}{\partial x} = g - \alpha - \beta x, \qquad
    \beta = \frac{\mathrm{cov}(g, x)}{\mathrm{var}(x) + \epsilon}, \qquad
    \alpha = \mathrm{mean}(g) - \beta\, \mathrm{mean}(x)

over the batch: the residual of a least-squares fit of g on 1 and x, of which
:math:`\epsilon` is the ridge. A normalizer with estimates can take the same
gradient, with the fit over the images that it saw lately.

That needs four statistics of each channel, here in this order in a tensor of
shape (..., 4, C): the mean and the variance of x, the mean of g, and the
covariance of both.
"""

import math
from typing import Callable, Tuple

import torch
from torch import Tensor

# From the statistics of a call's images, shape (N, 4, C), to those to fit to,
# shape (4, C). What it averages over moves with the call.
Average = Callable[[Tensor], Tensor]


def pool_statistics(statistics: Tensor, share: Tensor) -> Tensor:
    r"""Statistics of a union, from those of its parts.

    With :math:`w_i` the share of part i, and the means m and g, the variance
    v and the covariance c of each,

    .. math::
        M = \sum_i w_i m_i, \quad
        V = \sum_i w_i (v_i + (m_i - M)^2), \quad
        G = \sum_i w_i g_i, \quad
        C = \sum_i w_i (c_i + (m_i - M) g_i)

    Squares are taken about the mean: the difference of two averages would
    lose its digits where a mean is large.

    Args:
        statistics (Tensor): Of each part, shape (M, 4, C).
        share (Tensor): Of each part in the union, shape (M,). They sum to 1.

    Returns:
        Tensor: The statistics, shape (4, C).
    """
    mean, var, grad, cov = statistics.unbind(1)
    pooled_mean = share @ mean
    deviation = mean - pooled_mean
    return torch.stack(
        [
            pooled_mean,
            share @ torch.addcmul(var, deviation, deviation),
            share @ grad,
            share @ torch.addcmul(cov, deviation, grad),
        ]
    )


def join_statistics(first: Tensor, second: Tensor, share) -> Tensor:
    r"""Statistics of two parts together: :func:`pool_statistics` of them.

    .. math::
        V &= w v_1 + (1 - w) v_2 + w (1 - w) (m_1 - m_2)^2 \\
        C &= w c_1 + (1 - w) c_2 + w (1 - w) (m_1 - m_2) (g_1 - g_2)

    Args:
        first, second (Tensor): Of each part, shape (4, C).
        share (float | Tensor): Of the first in both, w.
    """
    joined = torch.lerp(second, first, share)
    mean, _, grad, _ = (first - second).unbind()
    cross = mean * (share * (1 - share))
    joined[1].addcmul_(cross, mean)
    joined[3].addcmul_(cross, grad)
    return joined


def subtract_fit(
    grad_mean: Tensor,
    grad_cov: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    length: int,
    average: Average,
) -> Tuple[Tensor, Tensor]:
    r"""What the fit adds to the gradients of an image's moments.

    A gradient that is linear in x is one of the moments m and v. With L
    positions, that of the fit, :math:`-\alpha - \beta x`, is

    .. math::
        \Delta \bar m = -L (\alpha + \beta m), \qquad
        \Delta \bar v = -\frac{L \beta}{2}

    Args:
        grad_mean (Tensor): The sum of g over the positions, shape (N, C).
        grad_cov (Tensor): The sum of :math:`g (x - m)`, shape (N, C).
        mean, var (Tensor): The moments m and v, shape (N, C).
        eps (float): Added to the variance.
        length (int): Positions of an image, L.
        average (Callable): From the statistics of the images, shape
            (N, 4, C), to those to fit to, shape (4, C).

    Returns:
        tuple[Tensor]: :math:`\Delta \bar m, \Delta \bar v`, shape (N, C).
    """
    statistics = torch.stack([mean, var, grad_mean, grad_cov], 1)
    statistics[:, 2:].div_(length)
    mean_of_all, var_of_all, grad, cov = average(statistics).unbind()
    # A constant channel has a covariance of 0, and without eps 0 / 0.
    beta = cov / (var_of_all + max(eps, torch.finfo(var.dtype).tiny))
    fit = torch.addcmul(grad, beta, mean - mean_of_all)
    return fit * -length, (beta * (-length / 2)).expand_as(var)


def fitted(pull_back: Callable, scale: Tensor, mean, var, **settings):
    """What pulls gradients of coefficients back, with the fit subtracted.

    Args:
        pull_back (Callable): From the gradients of scale and shift to those
            of the moments and the parameters, without.
        scale (Tensor): Of ``(x - mean) * scale + shift``.
        mean, var (Tensor): The moments, shape (N, C).
        **settings: Those of :func:`subtract_fit`.
    """

    def pull_back_fitted(grad_scale: Tensor, grad_shift: Tensor):
        grad_mean, grad_var, *grads = pull_back(grad_scale, grad_shift)
        grad_cov = torch.addcmul(scale * grad_scale, grad_var, var, value=2)
        to_mean, to_var = subtract_fit(
            grad_mean, grad_cov, mean, var, **settings
        )
        return grad_mean + to_mean, grad_var + to_var, *grads

    return pull_back_fitted


def is_in_window(images: Tensor, window: int, present) -> Tensor:
    """Which remembered calls are in a window of images, with the present one.

    Those before which fewer than ``window`` images have come since.

    Args:
        images (Tensor): How many images the layer had seen after each
            remembered call, shape (K,). 0 where there is none.
        window (int): Images to average over.
        present (int | Tensor): Images of the present call.
    """
    return (images > 0) & (images.max() - images < window - present)


def exponential_share(images, rate: float, present):
    r"""The share of an exponential average, when a call comes in.

    With q the rate and t images in all, n of them of the present call, the
    debiased average keeps

    .. math::
        1 - \frac{1 - (1 - q)^n}{1 - (1 - q)^t}

    Args:
        images (int | Tensor): How many images the average is made of, in
            floating point if a tensor.
        rate (float): The rate q, of an image.
        present (int | Tensor): Images of the present call.
    """
    decay = math.log1p(-rate)

    def share(count):  # of so many images in endlessly many
        if isinstance(count, Tensor):
            return -torch.expm1(count * decay)
        return -math.expm1(count * decay)

    return 1 - share(present) / share(images + present)
