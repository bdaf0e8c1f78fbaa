"""Triton kernels for the coefficients of Batch-Channel Normalization.

:class:`wsbcn_mm.functional.BatchChannelCoefficients` has the formulas. In
PyTorch's operations they are some forty launches of a few microseconds of
arithmetic each, which is what a small layer would spend its time on.
"""

from typing import Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .closed_form import Gradient
from .launch import kernel, on_its_device, power_of_2

AT_ONCE = 1024  # moments in a program's registers


@on_its_device
def batch_channel(
    mean: Tensor,
    var: Tensor,
    *parameters: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_groups: int,
    eps: float,
) -> Gradient:
    """The same as in ``closed_form``, one launch each way."""
    mean, var = mean.contiguous(), var.contiguous()
    scale, shift = mean.new_empty(2, *mean.shape)
    constants = num_groups, eps
    estimates = running_mean.contiguous(), running_var.contiguous()
    coefficients(
        (mean, var),
        (mean, var, scale, shift),
        estimates,
        parameters,
        *constants,
    )

    @on_its_device
    def pull_back(grad_scale: Tensor, grad_shift: Tensor):
        grad_mean, grad_var = mean.new_empty(2, *mean.shape)
        shares = Shares(mean, parameters)
        room = shares.room(mean)
        _backward(
            (
                *(mean, var, *estimates),
                *[t.contiguous() for t in parameters[:3]],
                *(grad_scale.contiguous(), grad_shift.contiguous()),
                *(grad_mean, grad_var, room),
            ),
            *of_groups(mean, parameters, *constants),
        )
        return grad_mean, grad_var, *shares.summed(room)

    return scale, shift, pull_back


def coefficients(
    tiles: Tuple[Tensor, Tensor],
    results: Tuple[Tensor, Tensor, Tensor, Tensor],
    estimates: Tuple[Tensor, Tensor],
    parameters: Sequence[Tensor],
    num_groups: int,
    eps: float,
    *,
    positions: int = 1,
    length: int = 1,
    learned: Optional[Tuple[Tensor, Tensor, Tensor]] = None,
    momentum: Optional[float] = 0.0,
    annealing: bool = False,
) -> None:
    """Fill in the mean, the variance, the scale and the shift, in one launch.

    Args:
        tiles (tuple[Tensor]): Mean and variance of each channel, or of tiles
            of so many of its positions.
        results (tuple[Tensor]): The four, shape (N, C). Of what is no tiles,
            mean and variance may be ``tiles``.
        estimates (tuple[Tensor]): ``running_mean`` and ``running_var``.
        parameters (Sequence[Tensor]): Batch weight and bias, weight and bias.
        num_groups (int): Number of channel groups.
        eps (float): Added to both variances.
        positions (int): In a tile.
        length (int): Number of positions.
        learned (tuple[Tensor] | None): Where to put the mean and the variance
            that the estimates are moved to, in place, before they are used,
            and the number of this forward. Default: None, they stay.
        momentum, annealing: See :func:`rate_of_forward`.
    """
    samples, channels = results[0].shape
    count = tiles[0].numel() // results[0].numel()
    size = power_of_2(channels // num_groups)
    most = power_of_2(count)
    if most > 1 and most * size > AT_ONCE:
        join_moments(tiles, results[:2], positions, length)
        tiles, count, most = results[:2], 1, 1
    at_once = min(power_of_2(samples), max(AT_ONCE // (size * most), 1))
    _forward(
        (
            *(*tiles, *results, *estimates, *(learned or results[:3])),
            *[t.contiguous() for t in parameters],
        ),
        num_groups,
        (
            *(samples, channels, num_groups, length, count),
            0.0 if momentum is None else momentum,
        ),
        (
            *(eps, parameters[2].numel() != num_groups, learned is not None),
            *(momentum is None, annealing, positions, at_once, size, most),
        ),
    )


def join_moments(
    tiles: Tuple[Tensor, Tensor],
    results: Tuple[Tensor, Tensor],
    positions: int,
    length: int,
) -> None:
    """Fill in the moments of channels from those of their tiles."""
    rows = results[0].numel()
    count = tiles[0].numel() // rows
    _join_moments(
        (*tiles, *results),
        rows,
        (length, count),
        (positions, power_of_2(count)),
    )


def of_groups(
    mean: Tensor, parameters: Sequence[Tensor], num_groups: int, eps: float
) -> Tuple[int, tuple, tuple]:
    """A program for each sample's group: their number, numbers, constants."""
    samples, channels = mean.shape
    per_channel = parameters[2].numel() != num_groups
    return (
        samples * num_groups,
        (channels, num_groups),
        (eps, per_channel, power_of_2(channels // num_groups)),
    )


class Shares:
    """Each sample's shares in the gradients of the parameters."""

    def __init__(self, mean: Tensor, parameters: Sequence[Tensor]):
        self._sizes = [t.numel() for t in parameters]
        self._shape = mean.shape[0], sum(self._sizes)

    def room(self, like: Tensor) -> Tensor:
        """Where kernels put them."""
        return like.new_empty(self._shape)

    def summed(self, shares: Tensor) -> Tuple[Tensor, ...]:
        """The gradients."""
        grads = shares.sum(0) if self._shape[0] > 1 else shares[0]
        return torch.split_with_sizes(grads, self._sizes)


@triton.jit
def load(pointer, index, inside, like):
    """In the dtype of statistics, which parameters need not have."""
    value = tl.load(pointer + index, inside, other=0)
    return value.to(like.dtype.element_ty)


@triton.jit
def _joined(
    tile_mean,
    tile_var,
    row,
    inside,
    length,
    tiles,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Mean and variance of each of a block of channels."""
    if TILES == 1:
        mean = tl.load(tile_mean + row, inside, other=0)
        return mean, tl.load(tile_var + row, inside, other=0)
    tile = tl.arange(0, TILES)[None, None, :]
    at = (row * tiles)[:, :, None] + tile
    there = inside[:, :, None] & (tile < tiles)
    m = tl.load(tile_mean + at, there, other=0)
    v = tl.load(tile_var + at, there, other=0)
    count = tl.minimum(length - tile * POSITIONS, POSITIONS)
    share = tl.where(tile < tiles, count, 0).to(m.dtype) / length
    # About one of the tiles' means: they are close to each other.
    first = tl.load(tile_mean + row * tiles, inside, other=0)
    mean = first + tl.sum((m - first[:, :, None]) * share, 2)
    centered = m - mean[:, :, None]
    return mean, tl.sum((v + centered * centered) * share, 2)


@kernel('length', 'tiles')
def _join_moments(
    tile_mean,
    tile_var,
    mean,
    var,
    length,
    tiles,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    m, v = _joined(
        tile_mean, tile_var, row, row >= 0, length, tiles, POSITIONS, TILES
    )
    tl.store(mean + row, m)
    tl.store(var + row, v)


@triton.jit
def _some_samples(
    tile_mean,
    tile_var,
    first,
    samples,
    channels,
    channel,
    inside,
    length,
    tiles,
    POSITIONS: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Their channels' rows, which of them there are, and their moments."""
    sample = first + tl.arange(0, SAMPLES)[:, None]
    there = inside & (sample < samples)
    row = sample.to(tl.int64) * channels + channel
    m, v = _joined(
        tile_mean, tile_var, row, there, length, tiles, POSITIONS, TILES
    )
    return row, there, m, v


@triton.jit
def _normalized(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    inside,
    size,
    EPS: tl.constexpr,
    AXIS: tl.constexpr,
):
    """What both ways need, in the notation of the formulas.

    Of blocks whose channels, all of a group, are along an axis.
    """
    inverse_std = tl.where(inside, 1 / tl.sqrt(running_var + EPS), 0)
    a = batch_weight * inverse_std
    moved = mean - running_mean
    centered = moved * a + batch_bias
    centered -= tl.sum(tl.where(inside, centered, 0), AXIS, True) / size
    centered = tl.where(inside, centered, 0)
    group_var = tl.sum(centered * centered + a * a * var, AXIS, True) / size
    return moved, inverse_std, a, centered, 1 / tl.sqrt(group_var + EPS)


@kernel('samples', 'channels', 'groups', 'length', 'tiles', 'momentum')
def _forward(
    tile_mean,
    tile_var,
    mean,
    var,
    scale,
    shift,
    running_mean,
    running_var,
    new_mean,
    new_var,
    count,
    batch_weight,
    batch_bias,
    weight,
    bias,
    samples,
    channels,
    groups,
    length,
    tiles,
    momentum: tl.float64,  # or it would come rounded to float32
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    LEARNS: tl.constexpr,
    AVERAGING: tl.constexpr,
    ANNEALING: tl.constexpr,
    POSITIONS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of a group, for all samples, some of them at a time."""
    group = tl.program_id(0)
    size = channels // groups
    lane = tl.arange(0, SIZE)[None, :]
    channel = group * size + lane
    inside = lane < size
    old_mean = load(running_mean, channel, inside, mean)
    old_var = load(running_var, channel, inside, mean)
    if LEARNS:
        rate = tl.full((), momentum, mean.dtype.element_ty)
        if AVERAGING:
            rate = 1 / tl.load(count).to(rate.dtype)
        elif ANNEALING:
            rate = tl.maximum(1 / (tl.load(count) + 1).to(rate.dtype), rate)
        delta = tl.zeros_like(old_mean)
        squares = tl.zeros_like(old_mean)
        first = samples * 0  # a tensor, as Triton wants it of a loop
        while first < samples:
            _, there, m, v = _some_samples(
                tile_mean,
                tile_var,
                first,
                samples,
                channels,
                channel,
                inside,
                length,
                tiles,
                POSITIONS,
                SAMPLES,
                TILES,
            )
            m = tl.where(there, m - old_mean, 0)
            delta += tl.sum(m, 0, True)
            squares += tl.sum(v + m * m, 0, True)
            first += SAMPLES
        moved_mean = old_mean + rate * (delta / samples)
        moved_var = old_var + rate * (squares / samples - old_var)
        # Neither infinite nor NaN: one overflow must not poison them.
        good = (moved_mean + moved_var) * 0 == 0
        # As they are rounded where they are kept.
        moved_mean = tl.where(good, moved_mean, old_mean).to(
            running_mean.dtype.element_ty
        )
        moved_var = tl.where(good, moved_var, old_var).to(
            running_var.dtype.element_ty
        )
        # Some of the program's threads look at the same estimates.
        tl.debug_barrier()
        tl.store(running_mean + channel, moved_mean, inside)
        tl.store(running_var + channel, moved_var, inside)
        old_mean = moved_mean.to(mean.dtype.element_ty)
        old_var = moved_var.to(mean.dtype.element_ty)
        tl.store(new_mean + channel, old_mean, inside)
        tl.store(new_var + channel, old_var, inside)
    batch_scale = load(batch_weight, channel, inside, mean)
    batch_shift = load(batch_bias, channel, inside, mean)
    # One output affine a channel, or the same one for all of a group.
    pair = channel if PER_CHANNEL else group + lane * 0
    gamma = load(weight, pair, inside, mean)
    beta = load(bias, pair, inside, mean)
    first = samples * 0
    while first < samples:
        row, there, m, v = _some_samples(
            tile_mean,
            tile_var,
            first,
            samples,
            channels,
            channel,
            inside,
            length,
            tiles,
            POSITIONS,
            SAMPLES,
            TILES,
        )
        if TILES > 1:
            tl.store(mean + row, m, there)
            tl.store(var + row, v, there)
        _, _, a, centered, q = _normalized(
            m,
            v,
            old_mean,
            old_var,
            batch_scale,
            batch_shift,
            inside,
            size,
            EPS,
            1,
        )
        p = gamma * q
        tl.store(scale + row, p * a, there)
        tl.store(shift + row, centered * p + beta, there)
        first += SAMPLES


@triton.jit
def place_of_group(channels, groups, SIZE: tl.constexpr):
    """A program's sample and group, and the channels of that group."""
    group = tl.program_id(0) % groups
    sample = tl.program_id(0) // groups
    size = channels // groups
    lane = tl.arange(0, SIZE)
    return sample, group, group * size + lane, lane < size, size


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
    row = sample * channels + channel
    v = load(var, row, inside, mean)
    moved, inverse_std, a, centered, q = _normalized(
        load(mean, row, inside, mean),
        v,
        load(running_mean, channel, inside, mean),
        load(running_var, channel, inside, mean),
        load(batch_weight, channel, inside, mean),
        load(batch_bias, channel, inside, mean),
        inside,
        size,
        EPS,
        0,
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
        tl.store(shares + group, tl.sum(grad_p * q, 0))
        tl.store(shares + pairs + group, tl.sum(t, 0))
    return p * a, a * grad_moved, 0.5 * a * a * slope


@kernel('channels', 'groups')
def _backward(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
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


@kernel('channels', 'groups', 'length', 'tiles')
def input_coefficients(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
    grad_shift,
    grad_scale,
    scale,
    slope,
    offset,
    shares,
    channels,
    groups,
    length,
    tiles,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Those that the gradient of the activations is affine with.

    From the sums over tiles that the gradients of shift and scale are.
    """
    sample, _, channel, inside, _ = place_of_group(channels, groups, SIZE)
    row = sample * channels + channel
    if TILES == 1:
        t = load(grad_shift, row, inside, mean)
        s = load(grad_scale, row, inside, mean)
    else:
        tile = tl.arange(0, TILES)[None, :]
        at = (row.to(tl.int64) * tiles)[:, None] + tile
        there = inside[:, None] & (tile < tiles)
        t = tl.sum(load(grad_shift, at, there, mean), 1)
        s = tl.sum(load(grad_scale, at, there, mean), 1)
    s, of_mean, of_var = pulled_back(
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
        EPS,
        PER_CHANNEL,
        SIZE,
    )
    k, rest = through_moments(of_mean, of_var, s, t, length)
    tl.store(scale + row, s, inside)
    tl.store(slope + row, k, inside)
    tl.store(offset + row, rest, inside)
