"""Triton kernels for CUDA, one launch a pass, in either layout.

A program has a tile of channels and positions of one sample, and is told by
strides where it lies. Reductions leave a value a tile, which one more launch
brings together where a channel has several tiles.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import dense, memory_format
from .plain import statistics_dtype

_ELEMENTS = 4096  # of a tile: 32 a thread


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    grid, arguments = _tiles(x)
    tiles = _empty(x, grid[0])
    _tile_moments[grid](x, *tiles, **arguments)
    if grid[0] == 1:
        mean, var = tiles
    else:
        mean, var = _empty(x, 1)
        _join_moments[(mean.numel(),)](
            *tiles,
            mean,
            var,
            arguments['length'],
            grid[0],
            POSITIONS=arguments['POSITIONS'],
            TILES=triton.next_power_of_2(grid[0]),
        )
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    result = torch.empty_like(x)
    small = (t.contiguous() for t in (center, scale, shift))
    grid, arguments = _tiles(x)
    _affine[grid](x, result, *small, **arguments)
    return result


def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    grad = grad.contiguous(memory_format=memory_format(x))
    grid, arguments = _tiles(x)
    tiles = _empty(x, grid[0])
    _tile_sums[grid](grad, x, center.contiguous(), *tiles, **arguments)
    total, product = tiles.sum(2) if grid[0] > 1 else tiles
    return total.view_as(center), product.view_as(center)


def input_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    x = dense(x)
    grad = grad.contiguous(memory_format=memory_format(x))
    result = torch.empty_like(x)
    small = (t.contiguous() for t in (center, scale, slope, offset))
    grid, arguments = _tiles(x)
    _input_grad[grid](grad, x, result, *small, **arguments)
    return result


def _empty(x: Tensor, tiles: int) -> Tensor:
    """Two statistics of each tile of each sample's channels."""
    dtype = statistics_dtype(x.dtype)
    return x.new_empty(2, x.shape[0] * x.shape[1], tiles, dtype=dtype)


def _tiles(x: Tensor) -> Tuple[Tuple[int, int, int], dict]:
    """How many there are (of positions, channels, samples), and arguments."""
    samples, channels = x.shape[:2]
    length = x[0, 0].numel()
    if x.is_contiguous():
        strides = length, 1
        width = min(triton.next_power_of_2(length), _ELEMENTS)
        height = min(
            triton.next_power_of_2(channels), max(1, _ELEMENTS // width)
        )
    else:
        strides = 1, channels
        height = min(triton.next_power_of_2(channels), 64)
        width = min(triton.next_power_of_2(length), _ELEMENTS // height)
    grid = triton.cdiv(length, width), triton.cdiv(channels, height), samples
    return grid, dict(
        channels=channels,
        length=length,
        channel_stride=strides[0],
        position_stride=strides[1],
        CHANNELS=height,
        POSITIONS=width,
    )


@triton.jit
def _place(
    channels,
    length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Rows of the small tensors, offsets into activations, masks of both."""
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    offset = (
        sample * channels * length
        + channel[:, None].to(tl.int64) * channel_stride
        + position[None, :] * position_stride
    )
    row = sample * channels + channel
    inside = channel < channels
    return row, inside, offset, inside[:, None] & (position < length)[None, :]


@triton.jit
def _tile_moments(
    x,
    mean,
    var,
    channels,
    length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row, inside, offset, mask = _place(
        channels, length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    value = tl.load(x + offset, mask, other=0).to(mean.dtype.element_ty)
    tile = tl.program_id(0)
    count = tl.minimum(length - tile * POSITIONS, POSITIONS)
    center = tl.sum(value, 1) / count
    centered = tl.where(mask, value - center[:, None], 0)
    out = row * tl.num_programs(0) + tile
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


@triton.jit
def _affine(
    x,
    result,
    center,
    scale,
    shift,
    channels,
    length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row, inside, offset, mask = _place(
        channels, length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    s = tl.load(scale + row, inside, other=0)[:, None]
    t = tl.load(shift + row, inside, other=0)[:, None]
    value = tl.load(x + offset, mask, other=0).to(c.dtype)
    value = (value - c) * s + t
    tl.store(result + offset, value.to(result.dtype.element_ty), mask)


@triton.jit
def _tile_sums(
    grad,
    x,
    center,
    total,
    product,
    channels,
    length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row, inside, offset, mask = _place(
        channels, length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    g = tl.load(grad + offset, mask, other=0).to(c.dtype)
    value = tl.load(x + offset, mask, other=0).to(c.dtype)
    # Outside of the mask g is 0, and so is its product with anything.
    out = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(total + out, tl.sum(g, 1), inside)
    tl.store(product + out, tl.sum(g * (value - c), 1), inside)


@triton.jit
def _input_grad(
    grad,
    x,
    result,
    center,
    scale,
    slope,
    shift,
    channels,
    length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row, inside, offset, mask = _place(
        channels, length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    c = tl.load(center + row, inside, other=0)[:, None]
    s = tl.load(scale + row, inside, other=0)[:, None]
    k = tl.load(slope + row, inside, other=0)[:, None]
    t = tl.load(shift + row, inside, other=0)[:, None]
    g = tl.load(grad + offset, mask, other=0).to(c.dtype)
    value = tl.load(x + offset, mask, other=0).to(c.dtype)
    value = g * s + (value - c) * k + t
    tl.store(result + offset, value.to(result.dtype.element_ty), mask)
