"""Triton kernels for the coefficients of Batch-Channel Normalization.

:class:`wsbcn_mm.functional.BatchChannelCoefficients` has the formulas. In
PyTorch's operations they are some forty launches of a few microseconds of
arithmetic each, which is what a small layer would spend its time on.
"""

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import triton
import triton.language as tl
from torch import Tensor

from .closed_form import Gradient
from .launch import (
    Buffer,
    Launch,
    kernel,
    on_its_device,
    planned,
    power_of_2,
)

# Numbers of a kind in a program's registers. A backward pass has more kinds.
_AT_ONCE = 1024
_AT_ONCE_BACKWARD = 512


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
    given = [
        t.contiguous()
        for t in (mean, var, *parameters, running_mean, running_var)
    ]
    mean, var, *parameters, running_mean, running_var = given
    forward, backward, shares, pair = _both_ways(
        *given, settings=(num_groups, eps, parameters[2].numel())
    )
    scale, shift = pair.allocate(mean, mean.dtype)
    estimates = running_mean, running_var
    forward((mean, var), (mean, var, scale, shift), estimates, parameters)

    @on_its_device
    def pull_back(grad_scale: Tensor, grad_shift: Tensor):
        grad_mean, grad_var = pair.allocate(mean, mean.dtype)
        room = shares.room(mean)
        backward(
            *(mean, var, *estimates, *parameters[:3]),
            *(grad_scale.contiguous(), grad_shift.contiguous()),
            *(grad_mean, grad_var, room),
        )
        return (
            grad_mean.view_as(mean),
            grad_var.view_as(mean),
            *shares.summed(room),
        )

    return scale.view_as(mean), shift.view_as(mean), pull_back


@planned
def _both_ways(shape, dtype, is_contiguous, *settings):
    groups = Groups(*shape, *settings)
    backward = Launch(_backward, *groups.each_of_samples())
    pair = Buffer([math.prod(shape)] * 2)
    return Coefficients(groups), backward, Shares(groups), pair


class Groups(NamedTuple):
    """The groups of channels that coefficients are computed of."""

    samples: int
    channels: int
    num_groups: int
    eps: float
    pairs: int  # of the output affine: one a group, or one a channel

    @property
    def size(self) -> int:
        """Room for the channels of one."""
        return power_of_2(self.channels // self.num_groups)

    @property
    def constants(self) -> tuple:
        return self.eps, self.pairs != self.num_groups

    @property
    def sizes(self) -> Tuple[int, ...]:
        """Of batch weight and bias, weight and bias."""
        return self.channels, self.channels, self.pairs, self.pairs

    def each_of_samples(self) -> Tuple[int, tuple, tuple]:
        """Programs, one for each sample's group, numbers and constants."""
        return (
            self.samples * self.num_groups,
            (self.channels, self.num_groups),
            (*self.constants, self.size),
        )

    def samples_at_once(self, tiles: int, most: int) -> int:
        """How many a program looks at together, of so many numbers."""
        room = max(most // (self.size * tiles), 1)
        return min(power_of_2(self.samples), room)


class Coefficients:
    """Fills in the mean, the variance, the scale and the shift.

    Args:
        groups (Groups): The groups.
        length (int): Number of positions.
        positions (int): In a tile.
        tiles (int): Of a channel.
        learning (tuple[bool] | None): Whether the estimates are what is used,
            once moved, or the batch's own statistics, whether they are moved
            by averaging, and whether by annealing. Default: None, they stay.

    Attributes:
        joins (bool): Whether the tiles are too many, and to be joined before.
    """

    def __init__(
        self,
        groups: Groups,
        length: int = 1,
        positions: int = 1,
        tiles: int = 1,
        learning: Optional[Tuple[bool, bool, bool]] = None,
    ):
        most = power_of_2(tiles)
        self.joins = tiles > 1 and most * groups.size > _AT_ONCE
        if self.joins:
            tiles = most = 1
        self._launch = Launch(
            _forward,
            groups.num_groups,
            (*groups[:3], length, tiles),
            (
                *(*groups.constants, learning is not None),
                *(learning or (True, False, False)),
                *(positions, groups.samples_at_once(most, _AT_ONCE)),
                *(groups.size, most),
            ),
        )

    def __call__(
        self,
        tiles: Sequence[Tensor],
        results: Sequence[Tensor],
        estimates: Tuple[Tensor, Tensor],
        parameters: Sequence[Tensor],
        learned: Sequence[Tensor] = (),
        momentum: Optional[float] = None,
    ) -> None:
        """Launch it.

        Args:
            tiles (Sequence[Tensor]): Mean and variance of each channel, or of
                tiles of it.
            results (Sequence[Tensor]): The four, (N, C) in memory. Of what is
                no tiles, mean and variance may be ``tiles``.
            estimates (tuple[Tensor]): ``running_mean`` and ``running_var``.
            parameters (Sequence[Tensor]): Batch weight and bias, weight and
                bias.
            learned (Sequence[Tensor]): Where to put the mean and the variance
                that are used, and the number of this forward: the estimates
                are moved, in place.
            momentum (float | None): See :func:`rate_of_forward`.
        """
        self._launch(
            *(*tiles, *results, *estimates, *(learned or results[:3])),
            *parameters,
            numbers=(0.0 if momentum is None else momentum,),
        )


class InputCoefficients:
    """Fills in the scale, the slope and the offset of a backward pass.

    Args:
        groups (Groups): The groups.
        length (int): Number of positions.
        tiles (int): Of a channel.
        estimate (bool): Whether what was normalized with are constants, or
            the statistics of the moments.

    Attributes:
        joins (bool): Whether the tiles are too many, and to be joined before.
    """

    def __init__(
        self, groups: Groups, length: int, tiles: int, estimate: bool
    ):
        most = power_of_2(tiles)
        self.joins = tiles > 1 and most * groups.size > _AT_ONCE_BACKWARD
        if self.joins:
            tiles = most = 1
        self._sizes = groups.sizes
        self._launch = Launch(
            _input_coefficients,
            groups.num_groups,
            (*groups[:3], length, tiles),
            (
                *(*groups.constants, estimate),
                groups.samples_at_once(most, _AT_ONCE_BACKWARD),
                *(groups.size, most),
            ),
        )

    def __call__(
        self,
        small: Sequence[Tensor],
        sums: Tuple[Tensor, Tensor],
        results: Sequence[Tensor],
    ) -> Tuple[Tensor, ...]:
        """Launch it.

        Args:
            small (Sequence[Tensor]): Mean and variance of each channel, the
                two that were normalized with, batch weight and bias, weight.
            sums (tuple[Tensor]): Of the gradient, and of its products with
                the centred input, in each channel or in tiles of it.
            results (Sequence[Tensor]): What the gradient of the input is
                affine with, (N, C) in memory.

        Returns:
            tuple[Tensor]: The gradients of the parameters, the last bias too,
            which has no part in it.
        """
        grads = small[0].new_empty(sum(self._sizes))
        self._launch(*small, *sums, *results, grads)
        return grads.split_with_sizes(self._sizes)


class Shares:
    """Each sample's shares in the gradients of the parameters."""

    def __init__(self, groups: Groups):
        self._sizes = groups.sizes
        self._samples = groups.samples

    def room(self, mean: Tensor) -> Tensor:
        """Where kernels put them."""
        return mean.new_empty(self._samples * sum(self._sizes))

    def summed(self, room: Tensor) -> Tuple[Tensor, ...]:
        """The gradients."""
        if self._samples > 1:
            room = room.view(self._samples, -1).sum(0)
        return room.split_with_sizes(self._sizes)


@triton.jit
def load(pointer, index, inside, like):
    """In the dtype of statistics, which parameters need not have."""
    value = tl.load(pointer + index, inside, other=0)
    return value.to(like.dtype.element_ty)


@triton.jit
def _channels_of_group(
    channels, groups, PER_CHANNEL: tl.constexpr, SIZE: tl.constexpr
):
    """A program's group, and its channels, in a row: for all samples."""
    group = tl.program_id(0)
    size = channels // groups
    lane = tl.arange(0, SIZE)[None, :]
    channel = group * size + lane
    # One output affine a channel, or the same one for all of a group.
    pair = channel if PER_CHANNEL else group + lane * 0
    return group, channel, lane < size, size, pair


@triton.jit
def _rows(first, samples, channels, channel, inside, SAMPLES: tl.constexpr):
    """Those of some samples' channels, and which of them there are."""
    sample = first + tl.arange(0, SAMPLES)[:, None]
    return (
        sample.to(tl.int64) * channels + channel,
        inside & (sample < samples),
    )


@triton.jit
def _tiles_of(row, inside, tiles, TILES: tl.constexpr):
    """The tiles of a block of channels, and which of them there are."""
    tile = tl.arange(0, TILES)[None, None, :]
    at = (row * tiles)[:, :, None] + tile
    return tile, at, inside[:, :, None] & (tile < tiles)


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
    tile, at, there = _tiles_of(row, inside, tiles, TILES)
    m = tl.load(tile_mean + at, there, other=0)
    v = tl.load(tile_var + at, there, other=0)
    count = tl.minimum(length - tile * POSITIONS, POSITIONS)
    share = tl.where(tile < tiles, count, 0).to(m.dtype) / length
    # About one of the tiles' means: they are close to each other.
    first = tl.load(tile_mean + row * tiles, inside, other=0)
    mean = first + tl.sum((m - first[:, :, None]) * share, 2)
    centered = m - mean[:, :, None]
    return mean, tl.sum((v + centered * centered) * share, 2)


def joining(rows: int, length: int, positions: int, tiles: int) -> Launch:
    """Return what fills in moments of channels from those of their tiles.

    Args:
        rows (int): Channels of all samples.
        length (int): Positions of a channel.
        positions (int): Positions of a tile.
        tiles (int): Tiles of a channel.
    """
    constants = positions, min(power_of_2(tiles), _AT_ONCE)
    return Launch(_join_moments, rows, (length, tiles), constants)


@kernel('length', 'tiles')
def _join_moments(
    tile_mean,
    tile_var,
    mean,
    var,
    length,
    tiles,
    POSITIONS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Of a channel, some of its tiles at a time."""
    row = tl.program_id(0).to(tl.int64)
    tile_mean += row * tiles
    tile_var += row * tiles
    # About one of the tiles' means: they are close to each other.
    first_mean = tl.load(tile_mean)
    lane = tl.arange(0, AT_ONCE)
    zeros = tl.zeros((AT_ONCE,), first_mean.dtype)
    total = zeros
    first = tiles * 0  # a tensor, as Triton wants it of a loop
    while first < tiles:
        tile = first + lane
        inside = tile < tiles
        m = tl.load(tile_mean + tile, inside, other=0)
        count = tl.minimum(length - tile * POSITIONS, POSITIONS)
        total += tl.where(inside, (m - first_mean) * count, 0)
        first += AT_ONCE
    center = first_mean + tl.sum(total, 0) / length
    total = zeros
    first = tiles * 0
    while first < tiles:
        tile = first + lane
        inside = tile < tiles
        m = tl.load(tile_mean + tile, inside, other=0) - center
        v = tl.load(tile_var + tile, inside, other=0)
        count = tl.minimum(length - tile * POSITIONS, POSITIONS)
        total += tl.where(inside, (v + m * m) * count, 0)
        first += AT_ONCE
    tl.store(mean + row, center)
    tl.store(var + row, tl.sum(total, 0) / length)


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
    row, there = _rows(first, samples, channels, channel, inside, SAMPLES)
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
    ESTIMATE: tl.constexpr,
    AVERAGING: tl.constexpr,
    ANNEALING: tl.constexpr,
    POSITIONS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of a group, for all samples, some of them at a time."""
    group, channel, inside, size, pair = _channels_of_group(
        channels, groups, PER_CHANNEL, SIZE
    )
    old_mean = load(running_mean, channel, inside, mean)
    old_var = load(running_var, channel, inside, mean)
    if LEARNS:
        rate = tl.full((), momentum, mean.dtype.element_ty)
        if AVERAGING:
            rate = 1 / tl.load(count).to(rate.dtype)
        elif ANNEALING:
            rate = tl.maximum(1 / (tl.load(count) + 1).to(rate.dtype), rate)
        # The definitions take the squares about the old mean, or about the
        # batch's own, which is found the first time.
        batch_mean = old_mean if ESTIMATE else tl.zeros_like(old_mean)
        for _time in tl.static_range(1 if ESTIMATE else 2):
            center = batch_mean
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
                m = tl.where(there, m - center, 0)
                delta += tl.sum(m, 0, True)
                squares += tl.sum(v + m * m, 0, True)
                first += SAMPLES
            batch_mean = center + delta / samples
        batch_var = squares / samples
        unbiased_var = batch_var
        if not ESTIMATE:
            values = samples.to(rate.dtype) * length
            unbiased_var *= values / tl.maximum(values - 1, 1)
        moved_mean = old_mean + rate * (batch_mean - old_mean)
        moved_var = old_var + rate * (unbiased_var - old_var)
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
        if ESTIMATE:
            used_mean = moved_mean.to(mean.dtype.element_ty)
            used_var = moved_var.to(mean.dtype.element_ty)
        else:
            used_mean, used_var = batch_mean, batch_var
        tl.store(new_mean + channel, used_mean, inside)
        tl.store(new_var + channel, used_var, inside)
    else:
        used_mean, used_var = old_mean, old_var
    batch_scale = load(batch_weight, channel, inside, mean)
    batch_shift = load(batch_bias, channel, inside, mean)
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
            used_mean,
            used_var,
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
def _gradients(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    gamma,
    s,
    t,
    inside,
    size,
    EPS: tl.constexpr,
    AXIS: tl.constexpr,
):
    """From gradients s, t of scale and shift, in the formulas' notation.

    Of blocks as :func:`_normalized` has them. Returns the scale, and the
    gradients of the moments, of the batch weight and bias, and of each
    channel's weight.
    """
    moved, inverse_std, a, centered, q = _normalized(
        mean,
        var,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        inside,
        size,
        EPS,
        AXIS,
    )
    p = gamma * q
    grad_p = a * s + centered * t
    # 2 / k times the gradient of the group's variance
    slope = -q * q * q * tl.sum(grad_p * gamma, AXIS, True) / size
    through_p = p * t
    through_p -= tl.sum(through_p, AXIS, True) / size
    grad_moved = through_p + centered * slope
    grad_a = p * s + a * var * slope + moved * grad_moved
    return (
        p * a,
        a * grad_moved,
        0.5 * a * a * slope,
        grad_a * inverse_std,
        grad_moved,
        grad_p * q,
    )


@triton.jit
def _store_gradients(
    grads,
    channel,
    group,
    inside,
    channels,
    groups,
    of_batch_weight,
    of_batch_bias,
    of_weight,
    of_bias,
    PER_CHANNEL: tl.constexpr,
):
    """Those of the parameters, one after the other."""
    pairs = channels if PER_CHANNEL else groups
    tl.store(grads + channel, of_batch_weight, inside)
    tl.store(grads + channels + channel, of_batch_bias, inside)
    grads += 2 * channels
    if PER_CHANNEL:
        tl.store(grads + channel, of_weight, inside)
        tl.store(grads + pairs + channel, of_bias, inside)
    else:
        tl.store(grads + group, tl.sum(of_weight))
        tl.store(grads + pairs + group, tl.sum(of_bias))


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

    Of a sample's group. Returns the scale and the gradients of the moments,
    and stores the sample's shares in those of the parameters.
    """
    sample, group, channel, inside, size = place_of_group(
        channels, groups, SIZE
    )
    row = sample * channels + channel
    pair = channel if PER_CHANNEL else channel // size
    scale, of_mean, of_var, of_a, of_b, of_gamma = _gradients(
        load(mean, row, inside, mean),
        load(var, row, inside, mean),
        load(running_mean, channel, inside, mean),
        load(running_var, channel, inside, mean),
        load(batch_weight, channel, inside, mean),
        load(batch_bias, channel, inside, mean),
        load(weight, pair, inside, mean),
        s,
        t,
        inside,
        size,
        EPS,
        0,
    )
    pairs = channels if PER_CHANNEL else groups
    _store_gradients(
        shares + sample.to(tl.int64) * 2 * (channels + pairs),
        channel,
        group,
        inside,
        channels,
        groups,
        of_a,
        of_b,
        of_gamma,
        t,
        PER_CHANNEL,
    )
    return scale, of_mean, of_var


@triton.jit
def through_moments(grad_mean, grad_var, scale, grad_shift, length):
    """Slope and offset in x of what comes to it through its moments."""
    # The centre is the mean as well: d/dm of (x - m) * scale.
    return 2 * grad_var / length, (grad_mean - scale * grad_shift) / length


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
def _summed(sums, row, there, tiles, like, TILES: tl.constexpr):
    """Of a block of channels, over their tiles."""
    if TILES == 1:
        return load(sums, row, there, like)
    _, at, every = _tiles_of(row, there, tiles, TILES)
    return tl.sum(load(sums, at, every, like), 2)


@kernel('samples', 'channels', 'groups', 'length', 'tiles')
def _input_coefficients(
    mean,
    var,
    used_mean,
    used_var,
    batch_weight,
    batch_bias,
    weight,
    grad_shift,
    grad_scale,
    scale,
    slope,
    offset,
    grads,
    samples,
    channels,
    groups,
    length,
    tiles,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ESTIMATE: tl.constexpr,
    SAMPLES: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of a group, for all samples, some of them at a time.

    The sums over tiles are the gradients of shift and scale.
    """
    group, channel, inside, size, pair = _channels_of_group(
        channels, groups, PER_CHANNEL, SIZE
    )
    mu = load(used_mean, channel, inside, mean)
    sigma_2 = load(used_var, channel, inside, mean)
    batch_scale = load(batch_weight, channel, inside, mean)
    batch_shift = load(batch_bias, channel, inside, mean)
    gamma = load(weight, pair, inside, mean)
    of_batch_weight = tl.zeros_like(mu)
    of_batch_bias = tl.zeros_like(mu)
    of_weight = tl.zeros_like(mu)
    of_bias = tl.zeros_like(mu)
    through_mean = tl.zeros_like(mu)  # of the batch
    through_var = tl.zeros_like(mu)
    # With the batch's statistics, a first time for what comes through them.
    for last in tl.static_range(1 if ESTIMATE else 0, 2):
        first = samples * 0  # a tensor, as Triton wants it of a loop
        while first < samples:
            row, there = _rows(
                first, samples, channels, channel, inside, SAMPLES
            )
            s = _summed(grad_scale, row, there, tiles, mean, TILES)
            t = _summed(grad_shift, row, there, tiles, mean, TILES)
            m = load(mean, row, there, mean)
            k, of_mean, of_var, of_a, of_b, of_gamma = _gradients(
                m,
                load(var, row, there, mean),
                mu,
                sigma_2,
                batch_scale,
                batch_shift,
                gamma,
                s,
                t,
                inside,
                size,
                EPS,
                1,
            )
            if last:
                if not ESTIMATE:
                    of_mean += through_mean + 2 * (m - mu) * through_var
                    of_var += through_var
                of_x, rest = through_moments(of_mean, of_var, k, t, length)
                tl.store(scale + row, k, there)
                tl.store(slope + row, of_x, there)
                tl.store(offset + row, rest, there)
            if ESTIMATE or not last:
                of_a = tl.where(there, of_a, 0)
                of_b = tl.where(there, of_b, 0)
                of_gamma = tl.where(there, of_gamma, 0)
                of_batch_weight += tl.sum(of_a, 0, True)
                of_batch_bias += tl.sum(of_b, 0, True)
                of_weight += tl.sum(of_gamma, 0, True)
                of_bias += tl.sum(t, 0, True)
            first += SAMPLES
        if not last:
            inverse_std = tl.where(inside, 1 / tl.sqrt(sigma_2 + EPS), 0)
            a = batch_scale * inverse_std
            through_mean = -a * of_batch_bias / samples
            through_var = -0.5 * a * inverse_std * of_batch_weight / samples
    _store_gradients(
        grads,
        channel,
        group,
        inside,
        channels,
        groups,
        of_batch_weight,
        of_batch_bias,
        of_weight,
        of_bias,
        PER_CHANNEL,
    )
