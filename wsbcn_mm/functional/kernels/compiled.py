"""Our own kernels for processors, compiled with the package.

``compiled.cpp`` has them: a pass over memory each, where PyTorch's operations
take two or need to look at the numbers first. They are for contiguous
float32; the rest goes to ``cpu``, and all of it where the package was
installed without a C++ compiler.
"""

import ctypes
import zlib
from pathlib import Path
from typing import Optional, Tuple

import torch
from torch import Tensor

from . import cpu
from .closed_form import Gradient
from .native_weight import standardize_weight

__all__ = [
    'affine',
    'averages_gradients',
    'batch_channel',
    'batch_channel_backward',
    'input_grad',
    'is_built',
    'moments',
    'moved_estimates',
    'reduce',
    'standardize_weight',
]

averages_gradients = True  # batch_channel_backward does
_SOURCE = Path(__file__).with_suffix('.cpp')
_SMALL = 1 << 15  # elements that one thread has done before others wake up

_pointer, _size = ctypes.c_void_p, ctypes.c_int64
_rows = [_size, _size, ctypes.c_int]  # their number, length; threads
_SIGNATURES = dict(
    moments=[_pointer, *_rows, *[_pointer] * 2],
    affine=[_pointer, *_rows, *[_pointer] * 4],
    reduce=[*[_pointer] * 2, *_rows, *[_pointer] * 3],
    input_grad=[*[_pointer] * 2, *_rows, *[_pointer] * 5],
    batch_channel=[*[_size] * 4, ctypes.c_double, *[_pointer] * 10],
    batch_channel_grad=[*[_size] * 4, ctypes.c_double, *[_pointer] * 16],
    moved_estimates=[
        *[*[_size] * 3, ctypes.c_double, ctypes.c_int],
        *[_pointer] * 6,
    ],
    batch_channel_backward=[
        *[*[_pointer] * 2, _size, ctypes.c_int],
        *[*[_size] * 4, ctypes.c_double, *[_pointer] * 14],
        *[_pointer, ctypes.c_double, *[_pointer] * 2],
    ],
)


def _load():
    failure = None
    # Several, where several Pythons were built for in one checkout.
    for built in sorted(_SOURCE.parent.glob('_compiled.*so')):
        try:
            return _open(built)
        except (ImportError, OSError) as error:
            failure = error
    if failure is not None:
        raise failure
    return None


def _open(built: Path):
    library = ctypes.CDLL(str(built))
    library.source_checksum.restype = ctypes.c_int64
    if library.source_checksum() != zlib.crc32(_SOURCE.read_bytes()):
        raise ImportError(
            f'{built.name} was compiled from another version of '
            f'{_SOURCE.name}; install the package again'
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


_library = _load()
is_built = _library is not None


def _call(name: str, *arguments) -> None:
    # The arguments hold the tensors until the function is done with them.
    getattr(_library, name)(
        *(t.data_ptr() if isinstance(t, Tensor) else t for t in arguments)
    )


def _is_served(x: Tensor, *others: Tensor) -> bool:
    # The memory of a view that torch negates as it reads it has other signs.
    is_negated = any(t.is_neg() for t in (x, *others))
    return x.dtype == torch.float32 and x.is_contiguous() and not is_negated


def _shape(x: Tensor) -> Tuple[int, int, int]:
    """Rows, their length, and threads for them."""
    rows = x.shape[0] * x.shape[1]
    threads = 1 if x.numel() <= _SMALL else torch.get_num_threads()
    return rows, x.numel() // rows, threads


def _contiguous(*tensors: Tensor):
    return (t.contiguous() for t in tensors)


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    if not _is_served(x):
        return cpu.moments(x)
    mean, var = x.new_empty(2, *x.shape[:2])
    _call('moments', x, *_shape(x), mean, var)
    return mean, var


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if not _is_served(x):
        return cpu.affine(x, center, scale, shift)
    result = torch.empty_like(x)
    small = _contiguous(center, scale, shift)
    _call('affine', x, *_shape(x), *small, result)
    return result


def reduce(grad: Tensor, x: Tensor, center: Tensor) -> Tuple[Tensor, Tensor]:
    if not _is_served(x, grad):
        return cpu.reduce(grad, x, center)
    total, product = x.new_empty(2, *x.shape[:2])
    grad, center = _contiguous(grad, center)
    _call('reduce', grad, x, *_shape(x), center, total, product)
    return total, product


def input_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    if not _is_served(x, grad):
        return cpu.input_grad(grad, x, center, scale, slope, offset)
    result = torch.empty_like(x)
    grad, *small = _contiguous(grad, center, scale, slope, offset)
    _call('input_grad', grad, x, *_shape(x), *small, result)
    return result


def batch_channel(
    mean: Tensor, var: Tensor, *parameters: Tensor, **constants
) -> Gradient:
    """The same as in ``closed_form``."""
    if mean.dtype != torch.float32:
        return cpu.batch_channel(mean, var, *parameters, **constants)
    sizes, inputs = _arguments(mean, var, *parameters, **constants)
    scale, shift = mean.new_empty(2, *mean.shape)
    _call('batch_channel', *sizes, *inputs, scale, shift)

    def pull_back(grad_scale: Tensor, grad_shift: Tensor):
        grads = [torch.empty_like(t) for t in inputs[:6]]
        given = _contiguous(grad_scale, grad_shift)
        _call('batch_channel_grad', *sizes, *inputs, *given, *grads)
        return tuple(grads)

    return scale, shift, pull_back


def batch_channel_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    *parameters: Tensor,
    average=None,
    **constants,
) -> Optional[Tuple[Tensor, ...]]:
    """``reduce``, what ``batch_channel`` pulls back, and ``input_grad``.

    Args:
        average (Callable | None): What the gradient is fitted to besides: see
            :class:`wsbcn_mm.functional.AveragedGradientCoefficients`.

    Returns:
        tuple | None: Gradients of ``x`` and of the parameters. None where the
        passes had better be taken one by one.
    """
    length, threads = _shape(x)[1:]
    if not _is_served(x, grad) or constants['num_groups'] < threads:
        return None
    sizes, inputs = _arguments(mean, var, *parameters, **constants)
    small = mean.new_empty(4, *mean.shape)
    grads = [torch.empty_like(t) for t in (x, *inputs[2:6])]
    fit = None, 0.0, None, None
    if average is not None:
        history, share = average.history(mean.dtype)
        present, joined = mean.new_empty(2, *history.shape)
        fit = history.contiguous(), share.item(), present, joined
    _call(
        'batch_channel_backward',
        *(grad.contiguous(), x, length, threads),
        *(*sizes, *inputs, small, *grads, *fit),
    )
    if average is not None:
        average.update(present, joined)
    return tuple(grads)


def moved_estimates(
    mean: Tensor, var: Tensor, **settings
) -> Tuple[Tensor, Tensor]:
    if mean.dtype != torch.float32:
        return cpu.moved_estimates(mean, var, **settings)
    running = settings['running_mean'], settings['running_var']
    momentum = settings['momentum']
    new_mean, new_var = mean.new_empty(2, mean.shape[1])
    _call(
        'moved_estimates',
        *mean.shape,
        settings['count'].item(),
        -1.0 if momentum is None else momentum,
        settings['annealing'],
        *(t.to(mean.dtype).contiguous() for t in (mean, var, *running)),
        *(new_mean, new_var),
    )
    return new_mean, new_var


def _arguments(
    mean: Tensor,
    *others: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_groups: int,
    eps: float,
):
    """Sizes and tensors as the functions of ``batch_channel`` have them."""
    inputs = [
        t.to(mean.dtype).contiguous()
        for t in (mean, *others, running_mean, running_var)
    ]
    pairs = inputs[4].numel() // num_groups
    return (*mean.shape, num_groups, pairs, eps), inputs
