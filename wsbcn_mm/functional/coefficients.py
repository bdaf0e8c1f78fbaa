"""From moments to coefficients: pure functions over small tensors.

Each takes the moments ``mean`` and ``var``, shape (N, C), first and returns
``scale`` and ``shift`` for ``(x - mean) * scale + shift``.

They divide by a square root. With ``rsqrt``, which ONNX writes as 1 / sqrt, a
fusion of onnxruntime (DivMulFusion, 1.16 to 1.23) loses a weight that is
equal to another layer's.
"""

from typing import Callable, Optional, Tuple, Union

import torch
from torch import Tensor

Statistics = Callable[[Tensor, Tensor], Tuple[Tensor, Tensor]]


def batch_statistics(
    mean: Tensor,
    var: Tensor,
    center: Optional[Tensor] = None,
    share: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over samples and positions.

    Args:
        mean, var (Tensor): Moments of the input, shape (N, C).
        center (Tensor | None): What the squares are taken about, shape (C,).
            Default: None, the mean itself.
        share (Tensor | None): Of each sample in the batch, shape (N, 1).
            Default: None, equal ones.
    """

    def average(values: Tensor) -> Tensor:
        if share is not None:
            return (values * share).sum(0)
        return values[0] if len(values) == 1 else values.mean(0)

    batch_mean = average(mean)
    center = batch_mean if center is None else center
    return batch_mean, average(var + (mean - center).square())


def moments_from_statistics(
    grad_mean: Tensor,
    grad_var: Tensor,
    deviation: Tensor,
    samples: Union[int, Tensor],
) -> Tuple[Tensor, Tensor]:
    """Gradients of the moments from those of :func:`batch_statistics`.

    Args:
        grad_mean, grad_var (Tensor): Of the statistics, shape (C,).
        deviation (Tensor): Of the samples' means from the batch's, (N, C).
        samples (int | Tensor): How many the batch has, here and elsewhere.
    """
    share = grad_var / samples
    # The mean that squares are taken about has no part in it: they are least
    # about it.
    of_mean = torch.addcmul(grad_mean / samples, deviation, share, value=2)
    return of_mean, share.expand_as(deviation)


def _vjp(mean: Tensor, var: Tensor):
    """The statistics, and from their gradients those of the moments."""
    batch_mean, batch_var = batch_statistics(mean, var)

    def pull_back(grad_mean: Tensor, grad_var: Tensor):
        return moments_from_statistics(
            grad_mean, grad_var, mean - batch_mean, len(mean)
        )

    return batch_mean, batch_var, pull_back


batch_statistics.vjp = _vjp


def group_coefficients(
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float,
) -> Tuple[Tensor, Tensor]:
    r"""Group Normalization.

    The mean and the variance of a group follow from those of its channels:

    .. math::
        M_{ng} = \mathrm{mean}_{c \in g}(m_{nc}), \qquad
        V_{ng} = \mathrm{mean}_{c \in g}(v_{nc}) +
                 \mathrm{var}_{c \in g}(m_{nc})

    Args:
        mean, var (Tensor): Moments of the input.
        weight, bias (Tensor): The affine, one pair per group or per channel.
        num_groups (int): Number of groups.
        eps (float): Added to the variance.
    """
    # Not unflatten, which ONNX's opset 11, that of MMDeploy, has not.
    channels = mean.shape[1] // num_groups
    shape = (mean.shape[0], num_groups, channels)
    grouped = mean.view(shape)
    group_mean = grouped.mean(2, keepdim=True)
    centered = grouped - group_mean
    group_var = var.view(shape).mean(2, keepdim=True)
    group_var = group_var + centered.square().mean(2, keepdim=True)
    scale = weight.view(num_groups, -1) / (group_var + eps).sqrt()
    shift = centered * scale + bias.view(num_groups, -1)
    return scale.expand_as(centered).flatten(1), shift.flatten(1)


def batch_channel_coefficients(
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
) -> Tuple[Tensor, Tensor]:
    r"""Batch-Channel Normalization with given batch statistics.

    The first affine, :math:`a x + b` with :math:`a = \gamma_b / \sqrt{\sigma^2
    + \epsilon}` and :math:`b = \beta_b - a \mu`, moves the moments to
    :math:`a m + b` and :math:`a^2 v`; Group Normalization follows.

    Args:
        mean, var (Tensor): Moments of the input.
        batch_weight, batch_bias (Tensor): The affine of the batch part.
        weight, bias (Tensor): The output affine, per group or per channel.
        running_mean, running_var (Tensor): :math:`\mu, \sigma^2`.
        num_groups (int): Number of channel groups.
        eps (float): Added to both variances.
    """
    batch_scale = batch_weight / (running_var + eps).sqrt()
    scale, shift = group_coefficients(
        (mean - running_mean) * batch_scale + batch_bias,
        batch_scale.square() * var,
        weight,
        bias,
        num_groups=num_groups,
        eps=eps,
    )
    return scale * batch_scale, shift


def large_batch_channel_coefficients(
    mean: Tensor,
    var: Tensor,
    *parameters: Tensor,
    num_groups: int,
    eps: float,
    statistics: Statistics = batch_statistics,
) -> Tuple[Tensor, Tensor]:
    """Batch-Channel Normalization with the batch's own statistics.

    Gradients flow through ``statistics``.
    """
    batch_mean, batch_var = statistics(mean, var)
    return batch_channel_coefficients(
        mean,
        var,
        *parameters,
        running_mean=batch_mean,
        running_var=batch_var,
        num_groups=num_groups,
        eps=eps,
    )


def batch_group_coefficients(
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float,
    statistics: Statistics = batch_statistics,
) -> Tuple[Tensor, Tensor]:
    """Batch Group Normalization, whose groups are over the batch as well.

    Args:
        mean, var (Tensor): Moments of the input.
        weight, bias (Tensor): The affine, one pair per channel.
        num_groups (int): Number of groups, a divisor of the channels.
        eps (float): Added to the variance.
        statistics (Callable): From moments to the batch's mean and variance
            of each channel. Default: :func:`batch_statistics`
    """
    group_mean, group_var = group_statistics(
        *statistics(mean, var), num_groups=num_groups
    )
    scale = weight / _per_channel((group_var + eps).sqrt(), mean)
    shift = (mean - _per_channel(group_mean, mean)) * scale + bias
    return scale.expand_as(mean), shift


def _per_channel(group: Tensor, mean: Tensor) -> Tensor:
    return group.repeat_interleave(mean.shape[1] // group.numel())


def group_statistics(
    mean: Tensor, var: Tensor, *, num_groups: int
) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of groups of channels.

    Args:
        mean, var (Tensor): Those of each channel, shape (C,).
        num_groups (int): Number of groups, a divisor of the channels.
    """
    mean, var = (t.unflatten(0, (num_groups, -1)) for t in (mean, var))
    return batch_statistics(mean.t(), var.t())
