"""Triton kernels for Weight Standardization: one launch each way."""

import math
from typing import Callable, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel, on_its_device, planned, power_of_2
from .layout import dense

_ELEMENTS = 4096  # of a filter, at a time


@on_its_device
def standardize_weight(
    weight: Tensor, var_eps: float, std_eps: float, dtype: torch.dtype
) -> Tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same as in ``plain``."""
    weight = dense(weight)
    result = torch.empty_like(weight, dtype=dtype)
    forward, backward = _both_ways(weight, result, settings=(var_eps, std_eps))
    forward(weight, result)

    @on_its_device
    def pull_back(grad: Tensor) -> Tensor:
        grad = dense(grad.to(dtype), like=weight)
        result = torch.empty_like(weight)
        backward(grad, weight, result)
        return result

    return result, pull_back


@planned
def _both_ways(shape, dtype, is_contiguous, var_eps, std_eps):
    filters = shape[0]
    count = math.prod(shape[1:])
    # As in ``fused``: what divides the length tells how much to load at once.
    unit = math.gcd(count, 8)
    at_once = min(power_of_2(count), _ELEMENTS)
    num_warps = min(max(at_once // 512, 1), 8)
    constants = unit, at_once, var_eps, std_eps, dtype == torch.float64
    return [
        Launch(function, filters, (count // unit,), constants, num_warps)
        for function in (_standardize, _pull_back)
    ]


@triton.jit
def _load(pointer, place, inside, like):
    return tl.load(pointer + place, inside, other=0).to(like.dtype)


@kernel('units')
def _standardize(
    weight,
    result,
    units,
    UNIT: tl.constexpr,
    ELEMENTS: tl.constexpr,
    VAR_EPS: tl.constexpr,
    STD_EPS: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
):
    count = units * UNIT
    start = tl.program_id(0).to(tl.int64) * count
    weight += start
    result += start
    zeros = tl.zeros((ELEMENTS,), tl.float64 if IS_DOUBLE else tl.float32)
    lane = tl.arange(0, ELEMENTS)
    total = zeros
    first = units * 0  # a tensor, as Triton wants it of a loop
    while first < count:
        total += _load(weight, first + lane, first + lane < count, zeros)
        first += ELEMENTS
    mean = tl.sum(total, 0) / count
    squares = zeros
    first = units * 0
    while first < count:
        inside = first + lane < count
        centered = _load(weight, first + lane, inside, zeros) - mean
        squares += tl.where(inside, centered * centered, 0)
        first += ELEMENTS
    deviation = tl.sqrt(tl.sum(squares, 0) / (count - 1) + VAR_EPS)
    inverse = 1 / (deviation + STD_EPS)
    first = units * 0
    while first < count:
        inside = first + lane < count
        value = _load(weight, first + lane, inside, zeros) - mean
        value = (value * inverse).to(result.dtype.element_ty)
        tl.store(result + first + lane, value, inside)
        first += ELEMENTS


@kernel('units')
def _pull_back(
    grad,
    weight,
    result,
    units,
    UNIT: tl.constexpr,
    ELEMENTS: tl.constexpr,
    VAR_EPS: tl.constexpr,
    STD_EPS: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
):
    """Compute i * (g - mean(g)) - i^2 * c * <g, c> / (s * (count - 1))

    with the centred filter c, s = sqrt(var + VAR_EPS) and i = 1 / (s +
    STD_EPS).
    """
    count = units * UNIT
    start = tl.program_id(0).to(tl.int64) * count
    grad += start
    weight += start
    result += start
    zeros = tl.zeros((ELEMENTS,), tl.float64 if IS_DOUBLE else tl.float32)
    lane = tl.arange(0, ELEMENTS)
    total = zeros
    grad_total = zeros
    first = units * 0
    while first < count:
        inside = first + lane < count
        total += _load(weight, first + lane, inside, zeros)
        grad_total += _load(grad, first + lane, inside, zeros)
        first += ELEMENTS
    mean = tl.sum(total, 0) / count
    grad_mean = tl.sum(grad_total, 0) / count
    squares = zeros
    product = zeros
    first = units * 0
    while first < count:
        inside = first + lane < count
        centered = _load(weight, first + lane, inside, zeros) - mean
        centered = tl.where(inside, centered, 0)
        squares += centered * centered
        product += centered * _load(grad, first + lane, inside, zeros)
        first += ELEMENTS
    deviation = tl.sqrt(tl.sum(squares, 0) / (count - 1) + VAR_EPS)
    inverse = 1 / (deviation + STD_EPS)
    # A constant filter takes no gradient through its deviation.
    divisor = tl.where(deviation > 0, deviation * (count - 1), 1)
    slope = inverse * inverse * tl.sum(product, 0) / divisor
    first = units * 0
    while first < count:
        inside = first + lane < count
        centered = _load(weight, first + lane, inside, zeros) - mean
        value = _load(grad, first + lane, inside, zeros) - grad_mean
        value = (value * inverse - centered * slope).to(
            result.dtype.element_ty
        )
        tl.store(result + first + lane, value, inside)
        first += ELEMENTS
