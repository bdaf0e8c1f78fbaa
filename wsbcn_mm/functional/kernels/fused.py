"""Triton kernels for CUDA, one launch a pass, in either layout.

A program has a tile of channels and positions of one sample. Reductions leave
a value a tile, and what comes next brings those of a channel together: the
coefficients of Batch-Channel Normalization, which take one launch each way, or
a launch of its own.
"""

import math
from typing import Callable, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_coefficients import (
    Shares,
    batch_channel,
    coefficients,
    input_coefficients,
    join_moments,
    load,
    of_groups,
    place_of_group,
    pulled_back,
    through_moments,
)
from .fused_weight import standardize_weight
from .launch import kernel, on_its_device, power_of_2
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
    tiling = _tiling(x)
    result = _small(x, len(x), len(x))
    tiles = _moments_of_tiles(x, result, tiling)
    if tiles is not result:
        join_moments(tiles, result, _positions(tiling), _length(x))
    return result


@on_its_device
def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    result = torch.empty_like(x)
    small = [t.contiguous() for t in (center, scale, shift)]
    _affine((x, result, *small), *_tiling(x))
    return result


@on_its_device
def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    grad = dense(grad, like=x)
    tiles = _sums_of_tiles(grad, x, center.contiguous(), _tiling(x))
    return (tiles if tiles.dim() == 3 else tiles.sum(3)).unbind()


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
    _input_grad((grad, x, result, *small), *_tiling(x))
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
) -> Tuple[Tensor, Tuple[Tensor, Tensor], Callable]:
    """A whole training forward: three launches, or four for many tiles."""
    x = dense(x)
    tiling = _tiling(x)
    mean, var, scale, shift, used = _small(x, *[len(x)] * 4, 2)
    used = used.unbind()
    tiles = _moments_of_tiles(x, (mean, var), tiling, count)
    coefficients(
        tiles,
        (mean, var, scale, shift),
        (running_mean, running_var),
        parameters,
        num_groups,
        eps,
        positions=_positions(tiling),
        length=_length(x),
        learned=(*used, count),
        momentum=momentum,
        annealing=annealing,
        estimate=estimate,
    )
    result = torch.empty_like(x)
    _affine((x, result, mean, scale, shift), *tiling)
    pull_back = _pull_back(
        mean, var, used, parameters, num_groups, eps, estimate
    )
    return result, used, pull_back


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
) -> Tuple[Tensor, ...]:
    """A whole backward pass: one launch where a group is a program's."""
    estimates = running_mean.contiguous(), running_var.contiguous()
    pull_back = _pull_back(mean, var, estimates, parameters, num_groups, eps)
    return pull_back(grad, x, *parameters)


def _pull_back(
    mean: Tensor,
    var: Tensor,
    statistics: Tuple[Tensor, Tensor],
    parameters: Tuple[Tensor, ...],
    num_groups: int,
    eps: float,
    estimate: bool = True,
) -> Callable[..., Tuple[Tensor, ...]]:
    """From the gradient, ``x`` and the parameters to their gradients."""
    programs, numbers, constants = of_groups(mean, parameters, num_groups, eps)

    @on_its_device
    def pull_back(
        grad: Tensor, x: Tensor, *parameters: Tensor
    ) -> Tuple[Tensor, ...]:
        x = dense(x)
        grad = dense(grad, like=x)
        result = torch.empty_like(x)
        length = _length(x)
        unit = math.gcd(length, 8)
        positions = power_of_2(length)
        # A float64 takes two registers.
        registers = constants[-1] * positions * mean.element_size() // 4
        if estimate and registers <= _elements(unit):
            shares = Shares(mean, parameters)
            _whole_backward(
                (
                    *(mean, var, *statistics),
                    *[t.contiguous() for t in parameters[:3]],
                    *(grad, x, result, shares.room),
                ),
                programs,
                (*numbers, length // unit),
                (*constants, unit, not x.is_contiguous(), positions),
                num_warps=_warps(registers),
            )
            return result, *shares.summed()
        tiling = _tiling(x)  # hooks may have changed its layout
        affine = mean.new_empty(3, *mean.shape).unbind()
        grads = input_coefficients(
            (mean, var),
            statistics,
            parameters,
            _sums_of_tiles(grad, x, mean, tiling),
            affine,
            num_groups,
            eps,
            length=length,
            estimate=estimate,
        )
        _input_grad((grad, x, result, mean, *affine), *tiling)
        return result, *grads

    return pull_back


def _moments_of_tiles(
    x: Tensor,
    result: Tuple[Tensor, Tensor],
    tiling: tuple,
    forwards: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Mean and variance of each tile, and one more of ``forwards``.

    Those of channels that are one tile are the result, and filled in there.
    """
    programs, numbers, constants = tiling
    rows = len(x) * _count(x, tiling)
    # By themselves, since a backward pass has no need of them.
    tiles = _small(x, rows, rows) if rows > len(x) else result
    _tile_moments(
        (x, *tiles, x if forwards is None else forwards),
        programs,
        numbers,
        (*constants, forwards is not None),
    )
    return tiles


def _sums_of_tiles(
    grad: Tensor, x: Tensor, center: Tensor, tiling: tuple
) -> Tensor:
    """Those of ``reduce``, of each tile, shape (2, N, C) or (2, N, C, *)."""
    shape = 2, *x.shape[:2]
    count = _count(x, tiling)
    if count > 1:
        shape = *shape, count
    tiles = x.new_empty(shape, dtype=statistics_dtype(x.dtype))
    _tile_sums((grad, x, center, *tiles.unbind()), *tiling)
    return tiles


def _small(x: Tensor, *rows: int) -> Tuple[Tensor, ...]:
    """Room for so many rows of a number a channel each, in one block."""
    dtype = statistics_dtype(x.dtype)
    block = x.new_empty(sum(rows), x.shape[1], dtype=dtype)
    return torch.split_with_sizes(block, rows)


def _length(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _elements(unit: int) -> int:
    """How many a program may have, of rows whose lengths this divides."""
    # Rows that it loads one by one take a register for every address.
    return _ELEMENTS if unit > 2 else _ELEMENTS // 4


def _warps(registers: int) -> int:
    """Of a program that holds as much of x, and of its gradient."""
    # 16 registers a thread for each: with 32 it takes up to all 255.
    return max(4, registers // 512)


def _tiling(x: Tensor) -> Tuple[int, tuple, tuple]:
    """Programs, numbers and constants of the kernels over tiles of ``x``."""
    samples, channels = x.shape[:2]
    length = _length(x)
    # Told what divides these, the compiler loads as much at once. That is all
    # it is told of them: else each size of image would be compiled for.
    unit, channel_unit = math.gcd(length, 8), math.gcd(channels, 16)
    is_last = not x.is_contiguous()
    if is_last:
        height = min(power_of_2(channels), 64)
        width = min(power_of_2(length), _ELEMENTS // height)
    else:
        width = min(power_of_2(length), _ELEMENTS)
        height = min(power_of_2(channels), max(1, _elements(unit) // width))
    # One dimension, since the others of a grid end at 65,535.
    programs = -(-length // width) * -(-channels // height) * samples
    numbers = channels // channel_unit, length // unit
    return programs, numbers, (channel_unit, unit, is_last, height, width)


def _positions(tiling: Tuple[int, tuple, tuple]) -> int:
    """Of a channel, in a tile."""
    return tiling[2][-1]


def _count(x: Tensor, tiling: Tuple[int, tuple, tuple]) -> int:
    """How many tiles a channel has."""
    return -(-_length(x) // _positions(tiling))


@triton.jit
def _place(
    channel_units,
    units,
    CHANNEL_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """A program's tile, their number, rows of small tensors, and where in x.

    That is in two parts, of which the one that every element has is a small
    number: it takes registers.
    """
    channels = channel_units * CHANNEL_UNIT
    length = units * UNIT
    tiles = tl.cdiv(length, POSITIONS)
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles  # of channels, of all samples
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
