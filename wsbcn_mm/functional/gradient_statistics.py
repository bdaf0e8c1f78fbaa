r"""Averaged statistics of the backward pass: pure functions of small tensors.

Batch Normalization's gradient has no part along a shift or a scaling of a
whole channel over its batch. With :math:`\hat x = (x - \mu) / \sigma`,
:math:`\sigma^2` including eps, and :math:`h = \partial L / \partial \hat x`,
it is

.. math::
    \frac{\partial L}{\partial x} = \frac{h - \alpha - \beta \hat x}{\sigma}

where :math:`\alpha, \beta` are the least-squares fit of h on 1 and
:math:`\hat x` over the batch. A normalizer with estimates of :math:`\mu` and
:math:`\sigma` can take the same gradient, with the fit over the images that it
saw lately.

The fit needs four statistics of each channel, here in this order, in a tensor
of shape (..., 4, C): the mean and the variance of :math:`\hat x`, the mean of
h, and the covariance of both.
"""

from typing import Callable, Tuple

import torch
from torch import Tensor

# From the statistics of a call's images, shape (N, 4, C), to those to fit to,
# shape (4, C). What it averages over moves with the call.
Average = Callable[[Tensor], Tensor]


def pool_statistics(statistics: Tensor, share: Tensor) -> Tensor:
    r"""Statistics of a union, from those of its parts.

    With :math:`w_i` the share of part i, means a and H, variances v and
    covariances c,

    .. math::
        A = \sum_i w_i a_i, \quad
        V = \sum_i w_i (v_i + (a_i - A)^2), \quad
        H = \sum_i w_i h_i, \quad
        C = \sum_i w_i (c_i + (a_i - A) h_i)

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
        V = w v_1 + (1 - w) v_2 + w (1 - w) (a_1 - a_2)^2, \qquad
        C = w c_1 + (1 - w) c_2 + w (1 - w) (a_1 - a_2) (h_1 - h_2)

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


def fit_gradient(statistics: Tensor, ridge: Tensor) -> Tuple[Tensor, Tensor]:
    r"""The least-squares fit of the gradient on 1 and the input.

    .. math::
        \beta = \frac{\mathrm{cov}(h, \hat x)}
                     {\mathrm{var}(\hat x) + \epsilon / \sigma^2}, \qquad
        \alpha = \mathrm{mean}(h) - \beta\, \mathrm{mean}(\hat x)

    The ridge :math:`\epsilon / \sigma^2` is what eps is in Batch
    Normalization: with :math:`\sigma^2` the variance of the batch plus eps,
    the denominator is 1. It bounds :math:`\beta` for a channel that hardly
    varies as well; a constant one has a covariance of 0.

    Args:
        statistics (Tensor): Shape (4, C).
        ridge (Tensor): :math:`\epsilon / \sigma^2`, shape (C,).

    Returns:
        tuple[Tensor]: :math:`\alpha, \beta`, shape (C,).
    """
    mean, var, grad, cov = statistics.unbind()
    # Of eps=0 and a constant channel: 0 / 0.
    beta = cov / (var + ridge).clamp(min=torch.finfo(var.dtype).tiny)
    return grad - beta * mean, beta


def subtract_fit(
    grad_mean: Tensor,
    grad_cov: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    length: int,
    average: Average,
) -> Tuple[Tensor, Tensor]:
    r"""What the fit adds to the gradients of an image's moments.

    A gradient of x is the same as one of its moments m and v where it is a
    linear function of x. That of the fit, with L positions, is

    .. math::
        \Delta \bar m = -\frac L\sigma
            \left(\alpha + \beta \frac{m - \mu}\sigma\right), \qquad
        \Delta \bar v = -\frac{L \beta}{2 \sigma^2}

    Args:
        grad_mean (Tensor): The sum of :math:`\partial L / \partial x` over the
            positions of each image and channel, shape (N, C).
        grad_cov (Tensor): The sum of :math:`(x - m)\, \partial L / \partial
            x`, shape (N, C).
        mean, var (Tensor): The moments m and v, shape (N, C).
        running_mean, running_var (Tensor): The estimates, shape (C,).
        eps (float): Added to the variance.
        length (int): Positions of an image, L.
        average (Callable): From the statistics of the images, shape
            (N, 4, C), to those to fit to, shape (4, C).

    Returns:
        tuple[Tensor]: :math:`\Delta \bar m, \Delta \bar v`, shape (N, C).
    """
    inverse_var = 1 / (running_var + eps)
    inverse_std = inverse_var.sqrt()
    normalized_mean = (mean - running_mean) * inverse_std
    statistics = torch.stack(
        [
            normalized_mean,
            var * inverse_var,
            grad_mean / (inverse_std * length),
            grad_cov / length,
        ],
        dim=1,
    )
    alpha, beta = fit_gradient(average(statistics), eps * inverse_var)
    per_mean = torch.addcmul(alpha, beta, normalized_mean) * inverse_std
    per_var = (beta * inverse_var).expand_as(var)
    return per_mean * -length, per_var * (-length / 2)


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
        images (int | Tensor): How many images the average is made of.
        rate (float): The rate q, of an image.
        present (int | Tensor): Images of the present call.
    """
    kept = 1 - rate
    return 1 - (1 - kept**present) / (1 - kept ** (images + present))
