"""Triton kernels for CUDA, one launch a pass, in either layout.

A program has a tile of channels and positions of one sample. Reductions leave
a value a tile, and what comes next brings those of a channel together: the
coefficients of Batch-Channel Normalization, which take one launch each way, or
a launch of its own.
"""

import math
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_coefficients import (
    Coefficients,
    Groups,
    InputCoefficients,
    Shares,
    batch_channel,
    joining,
    load,
    place_of_group,
    pulled_back,
    through_moments,
)
from .fused_weight import standardize_weight
from .launch import (
    Buffer,
    Launch,
    kernel,
    on_its_device,
    planned,
    power_of_2,
)
from .layout import dense
from .plain import moved_estimates, statistics_dtype

__all__ = [
    'affine',
    'batch_channel',
    'batch_channel_backward',
    'batch_channel_forward',
    'input_grad',
    'moments',
    'moved_estimates',
    'reduce',
    'standardize_weight',
]

_ELEMENTS = 4096  # of a tile: 32 a thread


@on_its_device
def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    passes = _passes(x)
    results = passes.pair.allocate(x, passes.dtype)
    passes.moments(x, results)
    return tuple(t.view(x.shape[:2]) for t in results)


@on_its_device
def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    result = torch.empty_like(x)
    small = [t.contiguous() for t in (center, scale, shift)]
    _passes(x, *small).affine(x, result, *small)
    return result


@on_its_device
def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    grad = dense(grad, like=x)
    center = center.contiguous()
    return _passes(x, grad, center).sums(grad, x, center)


@on_its_device
def input_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    x = dense(x)
    grad = dense(grad, like=x)
    result = torch.empty_like(x)
    small = [t.contiguous() for t in (center, scale, slope, offset)]
    _passes(x, grad, *small).input_grad(grad, x, result, *small)
    return result


@on_its_device
def batch_channel_forward(
    x: Tensor,
    *parameters: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor,
    momentum: Optional[float],
    annealing: bool,
    estimate: bool,
    num_groups: int,
    eps: float,
) -> Tuple[Tensor, Tuple[Tensor, ...]]:
    """A whole training forward: three launches, or four for many tiles."""
    x = dense(x)
    given = [*(t.contiguous() for t in parameters), running_mean, running_var]
    settings = num_groups, eps, parameters[2].numel()
    forward = _forward(
        *(x, *given, count),
        settings=(*settings, estimate, momentum is None, annealing),
    )
    return forward(x, given[:4], given[4:], count, momentum)


@on_its_device
def batch_channel_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    *parameters: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_groups: int,
    eps: float,
    estimate: bool = True,
) -> Tuple[Tensor, ...]:
    """A whole backward pass: one launch where a group is a program's."""
    x = dense(x)  # hooks may have changed its layout
    grad = dense(grad, like=x)
    # The last bias has no part in it.
    small = mean, var, running_mean, running_var, *parameters[:3]
    small = [t.contiguous() for t in small]
    settings = num_groups, eps, parameters[2].numel(), estimate
    return _backward(x, grad, *small, settings=settings)(grad, x, small)


class _Passes:
    """Launches over tiles of activations."""

    def __init__(self, shape, dtype, is_contiguous):
        samples, channels = shape[:2]
        self.shape = tuple(shape[:2])
        self.dtype = statistics_dtype(dtype)
        self.rows = samples * channels
        self.length = length = math.prod(shape[2:])
        # Told what divides these, the compiler loads as much at once. That is
        # all it is told of them: else each size of image would be compiled
        # for.
        self.unit = unit = math.gcd(length, 8)
        channel_unit = math.gcd(channels, 16)
        if is_contiguous:
            width = min(power_of_2(length), _ELEMENTS)
            height = max(1, _elements(unit) // width)
            height = min(power_of_2(channels), height)
        else:
            height = min(power_of_2(channels), 64)
            width = min(power_of_2(length), _ELEMENTS // height)
        self.positions = width
        self.tiles = -(-length // width)  # of a channel
        launch = (
            # One dimension, since the others of a grid end at 65,535.
            self.tiles * -(-channels // height) * samples,
            (channels // channel_unit, length // unit),
            (channel_unit, unit, not is_contiguous, height, width),
        )
        constants = launch[2]
        self._moments, self._counted_moments = (
            Launch(_tile_moments, *launch[:2], (*constants, counts))
            for counts in (False, True)
        )
        self.tile_sums = Launch(_tile_sums, *launch)
        self.affine = Launch(_affine, *launch)
        self.input_grad = Launch(_input_grad, *launch)
        self._join = joining(self.rows, length, width, self.tiles)
        self.pair = Buffer([self.rows] * 2)
        self.pair_of_tiles = Buffer([self.rows * self.tiles] * 2)

    def moments(
        self,
        x: Tensor,
        results: Tuple[Tensor, Tensor],
        forwards: Optional[Tensor] = None,
        join: bool = True,
    ) -> Tuple[Tensor, Tensor]:
        """Mean and variance of each channel, and one more of ``forwards``.

        They are filled in. Where there are several tiles and they are not to
        be joined, those of tiles are returned.
        """
        tiles = results
        if self.tiles > 1:
            # By themselves, since a backward pass has no need of them.
            tiles = self.pair_of_tiles.allocate(x, self.dtype)
        if forwards is None:
            self._moments(x, *tiles, x)
        else:
            self._counted_moments(x, *tiles, forwards)
        if self.tiles == 1 or not join:
            return tiles
        self._join(*tiles, *results)
        return results

    def sums(
        self, grad: Tensor, x: Tensor, center: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Those of ``reduce``."""
        tiles = x.new_empty(2, *self.shape, self.tiles, dtype=self.dtype)
        self.tile_sums(grad, x, center, *tiles.unbind())
        sums = tiles.squeeze(3) if self.tiles == 1 else tiles.sum(3)
        return sums.unbind()


class _Forward:
    """The launches of a training forward."""

    def __init__(
        self, shape, dtype, is_contiguous, num_groups, eps, pairs, *learning
    ):
        self._passes = passes = _Passes(shape, dtype, is_contiguous)
        self._coefficients = Coefficients(
            Groups(*passes.shape, num_groups, eps, pairs),
            passes.length,
            passes.positions,
            passes.tiles,
            learning,
        )
        # Mean, variance, scale, shift, and the two that are used.
        self._small = Buffer([passes.rows] * 4 + [passes.shape[1]] * 2)

    def __call__(self, x, parameters, estimates, count, momentum):
        small = self._small.allocate(x, self._passes.dtype)
        mean, var, scale, shift, *used = small
        coefficients = self._coefficients
        coefficients(
            self._passes.moments(x, (mean, var), count, coefficients.joins),
            (mean, var, scale, shift),
            estimates,
            parameters,
            (*used, count),
            momentum,
        )
        result = torch.empty_like(x)
        self._passes.affine(x, result, mean, scale, shift)
        return result, (mean, var, *used)


class _Backward:
    """The launches of a backward pass."""

    def __init__(
        self, shape, dtype, is_contiguous, num_groups, eps, pairs, estimate
    ):
        self._passes = passes = _Passes(shape, dtype, is_contiguous)
        groups = Groups(*passes.shape, num_groups, eps, pairs)
        self._shares = Shares(groups)
        self._whole = None
        length = passes.length
        unit, positions = passes.unit, power_of_2(length)
        # A float64 takes two registers.
        registers = groups.size * positions * passes.dtype.itemsize // 4
        if estimate and registers <= _elements(unit):
            programs, numbers, constants = groups.each_of_samples()
            self._whole = Launch(
                _whole_backward,
                programs,
                (*numbers, length // unit),
                (*constants, unit, not is_contiguous, positions),
                _warps(registers),
            )
        self._coefficients = InputCoefficients(
            groups, length, passes.tiles, estimate
        )
        # The three that the gradient of x is affine with, and the sums.
        sizes = [passes.rows] * 3
        if not self._coefficients.joins:
            sizes += [passes.rows * passes.tiles] * 2
        self._small = Buffer(sizes)

    def __call__(self, grad, x, small):
        result = torch.empty_like(x)
        mean = small[0]
        if self._whole:
            room = self._shares.room(mean)
            self._whole(*small, grad, x, result, room)
            return result, *self._shares.summed(room)
        passes = self._passes
        scale, slope, offset, *sums = self._small.allocate(x, passes.dtype)
        if sums:
            passes.tile_sums(grad, x, mean, *sums)
        else:
            sums = passes.sums(grad, x, mean)
        affine = scale, slope, offset
        grads = self._coefficients(small, sums, affine)
        passes.input_grad(grad, x, result, mean, *affine)
        return result, *grads


_passes, _forward, _backward = map(planned, (_Passes, _Forward, _Backward))


def _elements(unit: int) -> int:
    """How many a program may have, of rows whose lengths this divides."""
    # Rows that it loads one by one take a register for every address.
    return _ELEMENTS if unit > 2 else _ELEMENTS // 4


def _warps(registers: int) -> int:
    """Of a program that holds as much of x, and of its gradient."""
    # 16 registers a thread for each: with 32 it takes up to all 255.
    return max(4, registers // 512)


@triton.jit
def _place(
    channel_units,
    units,
    CHANNEL_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BACKWARDS: tl.constexpr = False,
):
    """A program's tile, their number, rows of small tensors, and where in x.

    That is in two parts, of which the one that every element has is a small
    number: it takes registers.

    A pass that comes after another goes backwards: what was read last is in
    the cache still, where all of it does not fit.
    """
    channels = channel_units * CHANNEL_UNIT
    length = units * UNIT
    tiles = tl.cdiv(length, POSITIONS)
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    tile = program % tiles
    block = program // tiles  # of channels, of all samples
    blocks = tl.cdiv(channels, CHANNELS)
    sample = (block // blocks).to(tl.int64)
    channel = block % blocks * CHANNELS
    position = tile * POSITIONS
    start = sample * channels * length
    i = tl.arange(0, CHANNELS)[:, None]
    j = tl.arange(0, POSITIONS)[None, :]
    if CHANNELS_LAST:
        start += position.to(tl.int64) * channels + channel
        offset = j * channels + i
    else:
        start += channel.to(tl.int64) * length + position
        offset = i * length + j
    channel += tl.arange(0, CHANNELS)
    inside = channel < channels
    mask = inside[:, None] & (position + j < length)
    return (
        tile,
        tiles,
        sample * channels + channel,
        inside,
        start,
        offset,
        mask,
    )


@kernel('channel_units', 'units')
def _tile_moments(
    x,
    mean,
    var,
    forwards,
    channel_units,
    units,
    CHANNEL_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    if COUNTS:  # which the launch that comes after it looks at
        if tl.program_id(0) == 0:
            tl.store(forwards, tl.load(forwards) + 1)
    tile, tiles, row, inside, start, offset, mask = _place(
        channel_units,
        units,
        CHANNEL_UNIT,
        UNIT,
        CHANNELS_LAST,
        CHANNELS,
        POSITIONS,
    )
    value = tl.load(x + start + offset, mask, other=0).to(
        mean.dtype.element_ty
    )
    count = tl.minimum(units * UNIT - tile * POSITIONS, POSITIONS)
    center = tl.sum(value, 1) / count
    centered = tl.where(mask, value - center[:, None], 0)
    out = row * tiles + tile
    tl.store(mean + out, center, inside)
    tl.store(var + out, tl.sum(centered * centered, 1) / count, inside)


@kernel('channel_units', 'units')
def _affine(
    x,
    result,
    center,
    scale,
    shift,
    channel_units,
    units,
    CHANNEL_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    _, _, row, inside, start, offset, mask = _place(
        channel_units,
        units,
        CHANNEL_UNIT,
        UNIT,
        CHANNELS_LAST,
        CHANNELS,
        POSITIONS,
        BACKWARDS=True,
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    s = tl.load(scale + row, inside, other=0)[:, None]
    t = tl.load(shift + row, inside, other=0)[:, None]
    value = tl.load(x + start + offset, mask, other=0).to(c.dtype)
    value = (value - c) * s + t
    tl.store(result + start + offset, value.to(result.dtype.element_ty), mask)


@kernel('channel_units', 'units')
def _tile_sums(
    grad,
    x,
    center,
    total,
    product,
    channel_units,
    units,
    CHANNEL_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    tile, tiles, row, inside, start, offset, mask = _place(
        channel_units,
        units,
        CHANNEL_UNIT,
        UNIT,
        CHANNELS_LAST,
        CHANNELS,
        POSITIONS,
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    g = tl.load(grad + start + offset, mask, other=0).to(c.dtype)
    value = tl.load(x + start + offset, mask, other=0).to(c.dtype)
    # Outside of the mask g is 0, and so is its product with anything.
    out = row * tiles + tile
    tl.store(total + out, tl.sum(g, 1), inside)
    tl.store(product + out, tl.sum(g * (value - c), 1), inside)


@kernel('channel_units', 'units')
def _input_grad(
    grad,
    x,
    result,
    center,
    scale,
    slope,
    shift,
    channel_units,
    units,
    CHANNEL_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    _, _, row, inside, start, offset, mask = _place(
        channel_units,
        units,
        CHANNEL_UNIT,
        UNIT,
        CHANNELS_LAST,
        CHANNELS,
        POSITIONS,
        BACKWARDS=True,
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    s = tl.load(scale + row, inside, other=0)[:, None]
    k = tl.load(slope + row, inside, other=0)[:, None]
    t = tl.load(shift + row, inside, other=0)[:, None]
    g = tl.load(grad + start + offset, mask, other=0).to(c.dtype)
    value = tl.load(x + start + offset, mask, other=0).to(c.dtype)
    value = g * s + (value - c) * k + t
    tl.store(result + start + offset, value.to(result.dtype.element_ty), mask)


@kernel('channels', 'groups', 'units')
def _whole_backward(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
    grad,
    x,
    result,
    shares,
    channels,
    groups,
    units,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    length = units * UNIT
    sample, group, channel, inside, size = place_of_group(
        channels, groups, SIZE
    )
    center = load(mean, sample * channels + channel, inside, mean)
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, POSITIONS)[None, :]
    start = sample.to(tl.int64) * channels * length
    if CHANNELS_LAST:
        start += group * size
        offset = j * channels + i
    else:
        start += group * size * length
        offset = i * length + j
    mask = inside[:, None] & (j < length)
    g = load(grad + start, offset, mask, mean)
    centered = load(x + start, offset, mask, mean) - center[:, None]
    grad_shift = tl.sum(g, 1)
    scale, grad_mean, grad_var = pulled_back(
        mean,
        var,
        running_mean,
        running_var,
        batch_weight,
        batch_bias,
        weight,
        # Outside of the mask g is 0, and so is its product with anything.
        tl.sum(g * centered, 1),
        grad_shift,
        shares,
        channels,
        groups,
        EPS,
        PER_CHANNEL,
        SIZE,
    )
    slope, rest = through_moments(
        grad_mean, grad_var, scale, grad_shift, length
    )
    value = g * scale[:, None] + centered * slope[:, None] + rest[:, None]
    value = value.to(result.dtype.element_ty)
    tl.store(result + start + offset, value, mask)
