"""Triton kernels for the coefficients of Batch-Channel Normalization.

:class:`wsbcn_mm.functional.BatchChannelCoefficients` has the formulas. In
PyTorch's operations they are some forty launches of a few microseconds of
arithmetic each, which is what a small layer would spend its time on.
"""

from typing import Optional, Sequence, Tuple

import triton
import triton.language as tl
from torch import Tensor

from .closed_form import Gradient
from .launch import on_its_device


@on_its_device
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
    parameters = batch_weight, batch_bias, weight, bias
    inputs, grid, arguments = programs(
        mean, var, running_mean, running_var, parameters, num_groups, eps
    )
    scale, shift = mean.new_empty(2, *mean.shape)
    _forward[grid](*inputs, scale, shift, **arguments)

    @on_its_device
    def pull_back(grad_scale: Tensor, grad_shift: Tensor):
        grad_mean, grad_var = mean.new_empty(2, *mean.shape)
        shares = room_for_shares(mean, parameters)
        _backward[grid](
            *inputs,
            grad_scale.contiguous(),
            grad_shift.contiguous(),
            grad_mean,
            grad_var,
            shares,
            **arguments,
        )
        return grad_mean, grad_var, *summed(shares, parameters)

    return scale, shift, pull_back


@on_its_device
def moved_estimates(
    mean: Tensor,
    var: Tensor,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor,
    momentum: Optional[float],
    annealing: bool,
) -> Tuple[Tensor, Tensor]:
    """The same as :func:`estimates.estimates_from_moments`, in one launch."""
    samples, channels = mean.shape
    new_mean, new_var = mean.new_empty(2, channels)
    _move_estimates[(triton.cdiv(channels, 32),)](
        mean.contiguous(),
        var.contiguous(),
        running_mean,
        running_var,
        count,
        new_mean,
        new_var,
        samples,
        channels,
        0.0 if momentum is None else momentum,
        AVERAGING=momentum is None,
        ANNEALING=annealing,
        SAMPLES=min(triton.next_power_of_2(samples), 32),
        CHANNELS=32,
    )
    return new_mean, new_var


def programs(
    mean, var, running_mean, running_var, parameters, num_groups, eps
):
    """Tensors, grid and arguments of a program for each sample's group."""
    samples, channels = mean.shape
    inputs = [
        t.contiguous()
        for t in (mean, var, running_mean, running_var, *parameters)
    ]
    arguments = dict(
        channels=channels,
        groups=num_groups,
        EPS=eps,
        PER_CHANNEL=parameters[2].numel() != num_groups,
        SIZE=triton.next_power_of_2(channels // num_groups),
    )
    return inputs, (samples * num_groups,), arguments


def room_for_shares(mean: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Room for each sample's share in the gradients of the parameters."""
    return mean.new_empty(len(mean), sum(t.numel() for t in parameters))


def summed(shares: Tensor, parameters: Sequence[Tensor]):
    grads = shares[0] if len(shares) == 1 else shares.sum(0)
    return grads.split([t.numel() for t in parameters])


@triton.jit
def load(pointer, index, inside, like):
    """In the dtype of statistics, which parameters need not have."""
    value = tl.load(pointer + index, inside, other=0)
    return value.to(like.dtype.element_ty)


@triton.jit
def place_of_group(channels, groups, SIZE: tl.constexpr):
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
    v = load(var, row, inside, mean)
    moved = load(mean, row, inside, mean)
    moved -= load(running_mean, channel, inside, mean)
    inverse_std = 1 / tl.sqrt(load(running_var, channel, inside, mean) + EPS)
    inverse_std = tl.where(inside, inverse_std, 0)  # no 0 * inf below
    a = load(batch_weight, channel, inside, mean) * inverse_std
    centered = moved * a + load(batch_bias, channel, inside, mean)
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
    sample, _, channel, inside, size = place_of_group(channels, groups, SIZE)
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
    p = load(weight, pair, inside, mean) * q
    tl.store(scale + row, p * a, inside)
    beta = load(bias, pair, inside, mean)
    tl.store(shift + row, centered * p + beta, inside)


@triton.jit
def pulled_back(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
    s,
    t,
    shares,
    channels,
    groups,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
):
    """From gradients s, t of scale and shift to those of all the rest.

    Returns the scale and the gradients of the moments, and stores the
    sample's shares in those of the parameters.
    """
    sample, group, channel, inside, size = place_of_group(
        channels, groups, SIZE
    )
    v, moved, inverse_std, a, centered, q = _normalized(
        mean,
        var,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        sample * channels + channel,
        channel,
        inside,
        size,
        EPS,
    )
    pair = channel if PER_CHANNEL else channel // size
    gamma = load(weight, pair, inside, mean)
    p = gamma * q

    grad_p = a * s + centered * t
    # 2 / k times the gradient of the group's variance
    slope = -q * q * q * tl.sum(grad_p * gamma, 0) / size
    through_p = p * t
    through_p -= tl.sum(through_p, 0) / size
    grad_moved = through_p + centered * slope
    grad_a = p * s + a * v * slope + moved * grad_moved

    pairs = channels if PER_CHANNEL else groups
    shares += sample.to(tl.int64) * 2 * (channels + pairs)
    tl.store(shares + channel, grad_a * inverse_std, inside)
    tl.store(shares + channels + channel, grad_moved, inside)
    shares += 2 * channels
    if PER_CHANNEL:
        tl.store(shares + channel, grad_p * q, inside)
        tl.store(shares + pairs + channel, t, inside)
    else:
        tl.store(shares + group, tl.sum(grad_p, 0) * q)
        tl.store(shares + pairs + group, tl.sum(t, 0))
    return p * a, a * grad_moved, 0.5 * a * a * slope


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
    sample, _, channel, inside, _ = place_of_group(channels, groups, SIZE)
    row = sample * channels + channel
    _, of_mean, of_var = pulled_back(
        mean,
        var,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        weight,
        load(grad_scale, row, inside, mean),
        load(grad_shift, row, inside, mean),
        shares,
        channels,
        groups,
        EPS,
        PER_CHANNEL,
        SIZE,
    )
    tl.store(grad_mean + row, of_mean, inside)
    tl.store(grad_var + row, of_var, inside)


@triton.jit
def through_moments(grad_mean, grad_var, scale, grad_shift, length):
    """Slope and offset in x of what comes to it through its moments."""
    # The centre is the mean as well: d/dm of (x - m) * scale.
    return 2 * grad_var / length, (grad_mean - scale * grad_shift) / length


@triton.jit
def input_coefficients(
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
    scale,
    slope,
    offset,
    shares,
    channels,
    groups,
    length,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Those that the gradient of the activations is affine with."""
    sample, _, channel, inside, _ = place_of_group(channels, groups, SIZE)
    row = sample * channels + channel
    t = load(grad_shift, row, inside, mean)
    s, of_mean, of_var = pulled_back(
        mean,
        var,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        weight,
        load(grad_scale, row, inside, mean),
        t,
        shares,
        channels,
        groups,
        EPS,
        PER_CHANNEL,
        SIZE,
    )
    k, rest = through_moments(of_mean, of_var, s, t, length)
    tl.store(scale + row, s, inside)
    tl.store(slope + row, k, inside)
    tl.store(offset + row, rest, inside)


@triton.jit(do_not_specialize=['samples'])
def _move_estimates(
    mean,
    var,
    running_mean,
    running_var,
    count,
    new_mean,
    new_var,
    samples,
    channels,
    momentum: tl.float64,  # or it would come rounded to float32
    AVERAGING: tl.constexpr,
    ANNEALING: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rate = tl.full((), momentum, mean.dtype.element_ty)
    if AVERAGING:
        rate = 1 / tl.load(count).to(rate.dtype)
    elif ANNEALING:
        rate = tl.maximum(1 / (tl.load(count) + 1).to(rate.dtype), rate)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    old_mean = load(running_mean, channel, inside, mean)
    old_var = load(running_var, channel, inside, mean)
    delta = tl.zeros_like(old_mean)
    squares = tl.zeros_like(old_mean)
    first = samples * 0  # a tensor, as Triton wants it of a loop
    while first < samples:
        sample = first + tl.arange(0, SAMPLES)[:, None]
        mask = (sample < samples) & inside[None, :]
        row = sample.to(tl.int64) * channels + channel[None, :]
        moved = tl.load(mean + row, mask, other=0) - old_mean[None, :]
        moved = tl.where(mask, moved, 0)
        delta += tl.sum(moved, 0)
        squares += tl.sum(tl.load(var + row, mask, other=0) + moved * moved, 0)
        first += SAMPLES
    moved_mean = old_mean + rate * (delta / samples)
    moved_var = old_var + rate * (squares / samples - old_var)
    # Neither infinite nor NaN: one overflow must not poison them.
    good = (moved_mean + moved_var) * 0 == 0
    tl.store(new_mean + channel, tl.where(good, moved_mean, old_mean), inside)
    tl.store(new_var + channel, tl.where(good, moved_var, old_var), inside)
