"""Triton kernels for the coefficients of Batch-Channel Normalization.

:class:`wsbcn_mm.functional.BatchChannelCoefficients` has the formulas. In
PyTorch's operations they are some forty launches of a few microseconds of
arithmetic each, which is what a small layer would spend its time on.
"""

import triton
import triton.language as tl
from torch import Tensor

from .closed_form import Gradient


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
    """The same as in ``closed_form``, one launch each way."""
    samples, channels = mean.shape
    inputs = [
        t.contiguous()
        for t in (
            *(mean, var, running_mean, running_var),
            *(batch_weight, batch_bias, weight, bias),
        )
    ]
    grid = (samples * num_groups,)
    arguments = dict(
        channels=channels,
        groups=num_groups,
        EPS=eps,
        PER_CHANNEL=weight.numel() != num_groups,
        SIZE=triton.next_power_of_2(channels // num_groups),
    )
    scale, shift = mean.new_empty(2, samples, channels)
    _forward[grid](*inputs, scale, shift, **arguments)

    def pull_back(grad_scale: Tensor, grad_shift: Tensor):
        grad_mean, grad_var = mean.new_empty(2, samples, channels)
        # A row has a sample's share in the gradient of each parameter.
        sizes = [t.numel() for t in inputs[4:]]
        shares = mean.new_empty(samples, sum(sizes))
        _backward[grid](
            *inputs,
            grad_scale.contiguous(),
            grad_shift.contiguous(),
            grad_mean,
            grad_var,
            shares,
            **arguments,
        )
        grads = shares[0] if samples == 1 else shares.sum(0)
        return grad_mean, grad_var, *grads.split(sizes)

    return scale, shift, pull_back


@triton.jit
def _load(pointer, index, inside, like):
    """In the dtype of statistics, which parameters need not have."""
    value = tl.load(pointer + index, inside, other=0)
    return value.to(like.dtype.element_ty)


@triton.jit
def _place(channels, groups, SIZE: tl.constexpr):
    """A program's sample and group, and the channels of that group."""
    group = tl.program_id(0) % groups
    sample = tl.program_id(0) // groups
    size = channels // groups
    lane = tl.arange(0, SIZE)
    return sample, group, group * size + lane, lane < size, size


@triton.jit
def _normalized(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    row,
    channel,
    inside,
    size,
    EPS: tl.constexpr,
):
    """What both ways need, in the notation of the formulas."""
    v = _load(var, row, inside, mean)
    moved = _load(mean, row, inside, mean)
    moved -= _load(running_mean, channel, inside, mean)
    inverse_std = 1 / tl.sqrt(_load(running_var, channel, inside, mean) + EPS)
    inverse_std = tl.where(inside, inverse_std, 0)  # no 0 * inf below
    a = _load(batch_weight, channel, inside, mean) * inverse_std
    centered = moved * a + _load(batch_bias, channel, inside, mean)
    centered = tl.where(inside, centered - tl.sum(centered, 0) / size, 0)
    q = 1 / tl.sqrt(tl.sum(centered * centered + a * a * v, 0) / size + EPS)
    return v, moved, inverse_std, a, centered, q


@triton.jit
def _forward(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
    bias,
    scale,
    shift,
    channels,
    groups,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
):
    sample, _, channel, inside, size = _place(channels, groups, SIZE)
    row = sample * channels + channel
    _, _, _, a, centered, q = _normalized(
        mean,
        var,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        row,
        channel,
        inside,
        size,
        EPS,
    )
    # One output affine a channel, or the same one for all of a group.
    pair = channel if PER_CHANNEL else channel // size
    p = _load(weight, pair, inside, mean) * q
    tl.store(scale + row, p * a, inside)
    beta = _load(bias, pair, inside, mean)
    tl.store(shift + row, centered * p + beta, inside)


@triton.jit
def _backward(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
    bias,
    grad_scale,
    grad_shift,
    grad_mean,
    grad_var,
    shares,
    channels,
    groups,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
):
    sample, group, channel, inside, size = _place(channels, groups, SIZE)
    row = sample * channels + channel
    v, moved, inverse_std, a, centered, q = _normalized(
        mean,
        var,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        row,
        channel,
        inside,
        size,
        EPS,
    )
    pair = channel if PER_CHANNEL else channel // size
    gamma = _load(weight, pair, inside, mean)
    s = _load(grad_scale, row, inside, mean)
    t = _load(grad_shift, row, inside, mean)
    p = gamma * q

    grad_p = a * s + centered * t
    # 2 / k times the gradient of the group's variance
    slope = -q * q * q * tl.sum(grad_p * gamma, 0) / size
    through_p = p * t
    through_p -= tl.sum(through_p, 0) / size
    grad_moved = through_p + centered * slope
    grad_a = p * s + a * v * slope + moved * grad_moved
    tl.store(grad_mean + row, a * grad_moved, inside)
    tl.store(grad_var + row, 0.5 * a * a * slope, inside)

    pairs = channels if PER_CHANNEL else groups
    shares += sample * 2 * (channels + pairs)
    tl.store(shares + channel, grad_a * inverse_std, inside)
    tl.store(shares + channels + channel, grad_moved, inside)
    shares += 2 * channels
    if PER_CHANNEL:
        tl.store(shares + channel, grad_p * q, inside)
        tl.store(shares + pairs + channel, t, inside)
    else:
        tl.store(shares + group, tl.sum(grad_p, 0) * q)
        tl.store(shares + pairs + group, tl.sum(t, 0))
