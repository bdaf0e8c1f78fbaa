"""Native CPU operations: vectorized sweeps, and pieces that fit the cache.

BatchNorm's native operations, handed (1, N * C, L) views and our own numbers
in place of the statistics, take the sums and apply the affine of contiguous
activations in one sweep each. They multiply before they subtract, which is
safe unless a mean is large against the spread.

For the rest, elementwise operations follow each other over pieces of a few
megabytes: the first one alone reads memory and the last one alone writes it,
so that this too is one pass. Activations are seen as (rows, positions,
lanes): (N * C, L, 1) if they are contiguous, (N, L, C) if channels_last.
"""

from typing import Iterator, Tuple

import torch
from torch import Tensor

from .closed_form import batch_channel
from .layout import dense, memory_format
from .native_weight import standardize_weight
from .plain import moved_estimates, statistics_dtype

__all__ = [
    'affine',
    'batch_channel',
    'input_grad',
    'moments',
    'moved_estimates',
    'reduce',
    'standardize_weight',
]

_PIECE = 1 << 20  # elements: two or three such pieces fit the cache
# How far a mean may lie from zero, in standard deviations, to be subtracted
# after the multiplication: it costs as many times the rounding error.
_FAR = 8


def _near(center: Tensor, scale: Tensor) -> bool:
    """Whether every ``center * scale`` is a small number.

    Then so are its rounding errors, whatever it is subtracted from.
    """
    farthest = torch.linalg.vector_norm(center * scale, float('inf'))
    return farthest.item() <= _FAR


def _is_far(mean: Tensor, var: Tensor, deviations: float) -> bool:
    """Whether any mean is farther from zero than some standard deviations.

    Squares that are not taken about the mean lose as many digits as the
    square of that number has.
    """
    excess = torch.sub(mean.square(), var, alpha=deviations**2)
    return not excess.max().item() <= 0


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    rows = _rows(x)
    length = rows.shape[1]
    dtype = statistics_dtype(x.dtype)
    if x.is_contiguous():  # one sweep for both, if that is exact enough
        total, squares = _sums(x, x, rows.new_zeros(x.shape[:2], dtype=dtype))
        mean = total.div_(length).view(x.shape[:2])
        var = squares.div_(length).view_as(mean).sub_(mean.square())
        if not _is_far(mean, var, 2):
            return mean, var
    # Of many positions this sum is more exact than the one above.
    mean = rows.sum(1, keepdim=True, dtype=dtype) / length
    if x.is_contiguous():
        _, squares = _sums(x, x, mean)
        var = squares.div_(length).view_as(mean)
        if not _is_far(mean, var, _FAR):
            return mean.view(x.shape[:2]), var.view(x.shape[:2])
    var = torch.zeros_like(mean)
    for piece, m, v, buffer in _pieces(rows, mean, var):
        torch.sub(_converted(piece, buffer), m, out=buffer)
        v.add_(buffer.square_().sum(1, keepdim=True))
    return mean.view(x.shape[:2]), var.div_(length).view(x.shape[:2])


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    if x.is_contiguous() and _near(center, scale):
        return _affine_in_one_sweep(x, center, scale, shift)
    result = torch.empty_like(x)
    for piece, y, c, s, t, buffer in _pieces(
        _rows(x), _rows(result), center, scale, shift
    ):
        work = y if y.dtype == buffer.dtype else buffer
        torch.sub(_converted(piece, buffer), c, out=work).mul_(s).add_(t)
        if work is buffer:
            y.copy_(buffer)
    return result


def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    x = dense(x)
    grad = grad.contiguous(memory_format=memory_format(x))
    if x.is_contiguous():
        total, product = _sums(grad, x, center)
        return total.view_as(center), product.view_as(center)
    rows = _rows(grad)
    total = rows.sum(1, keepdim=True, dtype=center.dtype)
    product = torch.zeros_like(total)
    for g, piece, c, p, buffer in _pieces(rows, _rows(x), center, product):
        torch.sub(_converted(piece, buffer), c, out=buffer).mul_(g)
        p.add_(buffer.sum(1, keepdim=True))
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
    if x.is_contiguous() and x.dtype == center.dtype and _near(center, scale):
        result = _affine_in_one_sweep(x, center, slope, offset)
        # An expanded scale is not contiguous, which _rows would follow.
        _rows(result).addcmul_(_rows(grad), scale.reshape(-1, 1, 1))
        return result
    result = torch.empty_like(x)
    for piece, g, y, c, s, k, t, buffer in _pieces(
        _rows(x), _rows(grad), _rows(result), center, scale, slope, offset
    ):
        work = y if y.dtype == buffer.dtype else buffer
        torch.sub(_converted(piece, buffer), c, out=work).mul_(k).add_(t)
        work.addcmul_(g, s)
        if work is buffer:
            y.copy_(buffer)
    return result


def _affine_in_one_sweep(
    x: Tensor, center: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """What BatchNorm does in evaluation, one channel a row."""
    result = torch.empty_like(x)
    rows = (1, center.numel(), -1)
    center = center.flatten()
    nothing = center.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x.view(rows),
        weight=scale.flatten(),
        bias=shift.flatten(),
        running_mean=center,
        running_var=torch.ones_like(center),
        training=False,
        momentum=0.0,
        eps=0.0,
        out=result.view(rows),
        save_mean=nothing,
        save_invstd=nothing,
    )
    return result


def _sums(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    """The sums of ``reduce``: those that BatchNorm's backward begins with."""
    rows = (1, center.numel(), -1)
    center = center.flatten()
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        grad.view(rows),
        x.view(rows),
        weight=None,
        running_mean=None,
        running_var=None,
        save_mean=center,
        save_invstd=torch.ones_like(center),
        train=True,
        eps=0.0,
        output_mask=[False, True, True],
    )
    return total, product


def _rows(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return x.view(x.shape[0] * x.shape[1], -1, 1)
    return x.movedim(1, -1).flatten(1, -2)


def _converted(piece: Tensor, buffer: Tensor) -> Tensor:
    return piece if piece.dtype == buffer.dtype else buffer.copy_(piece)


def _pieces(rows: Tensor, *others: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Cut rows, and tensors alike or with one value a row and lane.

    With each piece comes a buffer of its shape, for statistics: one memory
    for all, since fresh memory costs more than arithmetic.
    """
    count, positions, lanes = rows.shape
    tensors = [rows] + [
        t if t.shape == rows.shape else t.reshape(count, 1, lanes)
        for t in others
    ]
    height = max(1, _PIECE // (positions * lanes))
    width = max(1, _PIECE // lanes)
    buffer = rows.new_empty(
        min(height, count) * min(width, positions) * lanes,
        dtype=statistics_dtype(rows.dtype),
    )
    for row in zip(*(t.split(height) for t in tensors)):
        for start in range(0, positions, width):
            piece = [
                t if t.shape[1] == 1 else t[:, start : start + width]
                for t in row
            ]
            shape = piece[0].shape
            yield (*piece, buffer[: shape.numel()].view(shape))
