"""Triton kernels for CUDA, one launch a pass, in either layout.

A program has a tile of channels and positions of one sample. Reductions leave
a value a tile, which one more launch brings together where a channel has
several tiles. The coefficients of Batch-Channel Normalization take one launch
each way, too.
"""

import math
from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_coefficients import (
    batch_channel,
    input_coefficients,
    load,
    moved_estimates,
    place_of_group,
    programs,
    pulled_back,
    room_for_shares,
    summed,
    through_moments,
)
from .launch import on_its_device
from .layout import dense
from .plain import statistics_dtype

__all__ = [
    'affine',
    'batch_channel',
    'batch_channel_backward',
    'input_grad',
    'moments',
    'moved_estimates',
    'reduce',
]

_ELEMENTS = 4096  # of a tile: 32 a thread


@on_its_device
def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    count, grid, arguments = _tiles(x)
    tiles = _empty(x, count)
    _tile_moments[grid](x, *tiles, **arguments)
    if count == 1:
        mean, var = tiles
    else:
        mean, var = _empty(x, 1)
        _join_moments[(mean.numel(),)](
            *tiles,
            mean,
            var,
            x[0, 0].numel(),
            count,
            POSITIONS=arguments['POSITIONS'],
            TILES=triton.next_power_of_2(count),
        )
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


@on_its_device
def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    result = torch.empty_like(x)
    small = (t.contiguous() for t in (center, scale, shift))
    _, grid, arguments = _tiles(x)
    _affine[grid](x, result, *small, **arguments)
    return result


@on_its_device
def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    grad = dense(grad, like=x)
    count, grid, arguments = _tiles(x)
    tiles = _empty(x, count)
    _tile_sums[grid](grad, x, center.contiguous(), *tiles, **arguments)
    total, product = tiles.sum(2) if count > 1 else tiles
    return total.view_as(center), product.view_as(center)


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
    small = (t.contiguous() for t in (center, scale, slope, offset))
    _, grid, arguments = _tiles(x)
    _input_grad[grid](grad, x, result, *small, **arguments)
    return result


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
) -> Tuple[Tensor, ...]:
    """A whole backward pass: one launch where a group is a program's."""
    inputs, grid, arguments = programs(
        mean, var, running_mean, running_var, parameters, num_groups, eps
    )
    x = dense(x)
    grad = dense(grad, like=x)
    shares = room_for_shares(mean, parameters)
    length = x[0, 0].numel()
    unit = math.gcd(length, 8)
    positions = triton.next_power_of_2(length)
    # A float64 takes two registers.
    registers = arguments['SIZE'] * positions * mean.element_size() // 4
    if registers <= _elements(unit):
        result = torch.empty_like(x)
        _whole_backward[grid](
            *inputs,
            grad,
            x,
            result,
            shares,
            units=length // unit,
            UNIT=unit,
            CHANNELS_LAST=not x.is_contiguous(),
            POSITIONS=positions,
            num_warps=_warps(registers),
            **arguments,
        )
    else:
        grad_shift, grad_scale = reduce(grad, x, mean)
        small = mean.new_empty(3, *mean.shape)
        input_coefficients[grid](
            *inputs,
            grad_scale,
            grad_shift,
            *small,
            shares,
            length=length,
            **arguments,
        )
        result = input_grad(grad, x, mean, *small)
    return result, *summed(shares, parameters)


def _empty(x: Tensor, tiles: int) -> Tensor:
    """Two statistics of each tile of each sample's channels."""
    dtype = statistics_dtype(x.dtype)
    return x.new_empty(2, x.shape[0] * x.shape[1], tiles, dtype=dtype)


def _elements(unit: int) -> int:
    """How many a program may have, of rows whose lengths this divides."""
    # Rows that it loads one by one take a register for every address.
    return _ELEMENTS if unit > 2 else _ELEMENTS // 4


def _warps(registers: int) -> int:
    """Of a program that holds as much of x, and of its gradient."""
    # 16 registers a thread for each: with 32 it takes up to all 255.
    return max(4, registers // 512)


def _tiles(x: Tensor) -> Tuple[int, Tuple[int], dict]:
    """How many a channel has, how many there are, and arguments."""
    samples, channels = x.shape[:2]
    length = x[0, 0].numel()
    # Told what divides the length, the compiler loads as much at once. That is
    # all it is told of it: else each size of image would be compiled for.
    unit = math.gcd(length, 8)
    if x.is_contiguous():
        width = min(triton.next_power_of_2(length), _ELEMENTS)
        height = min(
            triton.next_power_of_2(channels),
            max(1, _elements(unit) // width),
        )
    else:
        height = min(triton.next_power_of_2(channels), 64)
        width = min(triton.next_power_of_2(length), _ELEMENTS // height)
    count = triton.cdiv(length, width)
    # One dimension, since the others of a grid end at 65,535.
    grid = (count * triton.cdiv(channels, height) * samples,)
    return (
        count,
        grid,
        dict(
            channels=channels,
            units=length // unit,
            UNIT=unit,
            CHANNELS_LAST=not x.is_contiguous(),
            CHANNELS=height,
            POSITIONS=width,
        ),
    )


@triton.jit
def _place(
    channels,
    units,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """A program's tile, their number, rows of small tensors, and where in x.

    That is in two parts, of which the one that every element has is a small
    number: it takes registers.
    """
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


@triton.jit(do_not_specialize=['units'])
def _tile_moments(
    x,
    mean,
    var,
    channels,
    units,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    tile, tiles, row, inside, start, offset, mask = _place(
        channels, units, UNIT, CHANNELS_LAST, CHANNELS, POSITIONS
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


@triton.jit
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
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    m = tl.load(tile_mean + row * tiles + tile, inside, other=0)
    v = tl.load(tile_var + row * tiles + tile, inside, other=0)
    count = tl.minimum(length - tile * POSITIONS, POSITIONS)
    share = tl.where(inside, count, 0).to(m.dtype) / length
    # About one of the tiles' means: they are close to each other.
    first = tl.load(tile_mean + row * tiles)
    center = first + tl.sum((m - first) * share, 0)
    tl.store(mean + row, center)
    centered = m - center
    tl.store(var + row, tl.sum((v + centered * centered) * share, 0))


@triton.jit(do_not_specialize=['units'])
def _affine(
    x,
    result,
    center,
    scale,
    shift,
    channels,
    units,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    _, _, row, inside, start, offset, mask = _place(
        channels, units, UNIT, CHANNELS_LAST, CHANNELS, POSITIONS
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    s = tl.load(scale + row, inside, other=0)[:, None]
    t = tl.load(shift + row, inside, other=0)[:, None]
    value = tl.load(x + start + offset, mask, other=0).to(c.dtype)
    value = (value - c) * s + t
    tl.store(result + start + offset, value.to(result.dtype.element_ty), mask)


@triton.jit(do_not_specialize=['units'])
def _tile_sums(
    grad,
    x,
    center,
    total,
    product,
    channels,
    units,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    tile, tiles, row, inside, start, offset, mask = _place(
        channels, units, UNIT, CHANNELS_LAST, CHANNELS, POSITIONS
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    g = tl.load(grad + start + offset, mask, other=0).to(c.dtype)
    value = tl.load(x + start + offset, mask, other=0).to(c.dtype)
    # Outside of the mask g is 0, and so is its product with anything.
    out = row * tiles + tile
    tl.store(total + out, tl.sum(g, 1), inside)
    tl.store(product + out, tl.sum(g * (value - c), 1), inside)


@triton.jit(do_not_specialize=['units'])
def _input_grad(
    grad,
    x,
    result,
    center,
    scale,
    slope,
    shift,
    channels,
    units,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    _, _, row, inside, start, offset, mask = _place(
        channels, units, UNIT, CHANNELS_LAST, CHANNELS, POSITIONS
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    s = tl.load(scale + row, inside, other=0)[:, None]
    k = tl.load(slope + row, inside, other=0)[:, None]
    t = tl.load(shift + row, inside, other=0)[:, None]
    g = tl.load(grad + start + offset, mask, other=0).to(c.dtype)
    value = tl.load(x + start + offset, mask, other=0).to(c.dtype)
    value = g * s + (value - c) * k + t
    tl.store(result + start + offset, value.to(result.dtype.element_ty), mask)


@triton.jit(do_not_specialize=['units'])
def _whole_backward(
    mean,
    var,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
    bias,
    grad,
    x,
    result,
    shares,
    channels,
    groups,
    units,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS: tl.constexpr,
    EPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
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
