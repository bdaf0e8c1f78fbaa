"""Does a backend compute what the definition does?

The tests compare every function of a backend, on drawn inputs. This is what a
training can wait for: a few kernels, which Triton compiles at their first use.
"""

from types import ModuleType
from typing import Dict

import torch
from torch import Tensor

from . import plain
from .layout import memory_format
from .passes import backward

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
_SETTINGS = dict(num_groups=2, eps=1e-5)
# One map in several tiles, and one of which a program has a whole group.
_MAPS = [
    ((2, 12, 67, 71), torch.contiguous_format),
    ((2, 12, 5, 7), torch.channels_last),
]


def check_first_use(
    backend: ModuleType, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise unless a backend trains a layer right on a device.

    Compares a training step of Batch-Channel Normalization, on a large and a
    small map, and a standardized weight with its gradient. Draws no random
    numbers, since whoever trains with a seed has not asked for this.

    Args:
        backend (module): What :func:`wsbcn_mm.functional.kernels.select` could
            give.
        device (torch.device): Where to run the backend.
        dtype (torch.dtype): Dtype of the activations.
    """
    for shape, layout in _MAPS:
        x, grad = 2 * waves(shape, 1.7) + 1, waves(shape, 2.3)
        x, grad = (
            t.to(device, dtype).contiguous(memory_format=layout)
            for t in (x, grad)
        )
        results = _training_step(backend, x, grad)
        _compare(results, _training_step(plain, *_wide(x, grad)), dtype)
        for name in ('result', 'grad of x'):
            check_layout(results[name], x)
    # Under autocast the weight keeps its dtype.
    weight = waves((4, 3, 3, 3), 1.3).to(device, plain.statistics_dtype(dtype))
    grad = waves(weight.shape, 0.7).to(device, dtype)
    results = _standardize(backend, weight, grad)
    _compare(results, _standardize(plain, *_wide(weight, grad)), dtype)


def _training_step(
    backend: ModuleType, x: Tensor, grad: Tensor
) -> Dict[str, Tensor]:
    """Return what a training step of a layer computes, by name."""
    channels, num_groups = x.shape[1], _SETTINGS['num_groups']
    sizes = [channels, channels, num_groups, num_groups, channels, channels]
    *parameters, running_mean, running_var = (
        (waves((size,), step) + 1.5).to(
            x.device, plain.statistics_dtype(x.dtype)
        )
        for step, size in enumerate(sizes, 1)
    )
    estimates = dict(running_mean=running_mean, running_var=running_var)
    count = torch.tensor(3, device=x.device)
    rate = dict(count=count, momentum=0.1, annealing=False)
    if hasattr(backend, 'batch_channel_forward'):  # moves them in place
        result, (mean, var, *_) = backend.batch_channel_forward(
            x, *parameters, **estimates, **rate, **_SETTINGS, estimate=True
        )
    else:
        mean, var = backend.moments(x)
        moved = backend.moved_estimates(mean, var, **estimates, **rate)
        estimates = dict(zip(estimates, moved))
        scale, shift, pull_back = backend.batch_channel(
            mean, var, *parameters, **estimates, **_SETTINGS
        )
        result = backend.affine(x, mean, scale, shift)
    grads = None
    if hasattr(backend, 'batch_channel_backward'):
        grads = backend.batch_channel_backward(
            grad, x, mean, var, *parameters, **estimates, **_SETTINGS
        )
    if grads is None:
        grads = backward(backend, grad, x, mean, scale, pull_back)
    names = 'x', 'batch weight', 'batch bias', 'weight', 'bias'
    gradients = {f'grad of {name}': g for name, g in zip(names, grads)}
    mean, var = (t.view(x.shape[:2]) for t in (mean, var))
    return dict(result=result, mean=mean, var=var, **estimates, **gradients)


def _standardize(
    backend: ModuleType, weight: Tensor, grad: Tensor
) -> Dict[str, Tensor]:
    """Return a standardized weight and the gradient of the weight."""
    result, pull_back = backend.standardize_weight(
        weight, 0.0, 1e-5, grad.dtype
    )
    return {'weight': result, 'grad of a weight': pull_back(grad)}


def _compare(
    results: Dict[str, Tensor],
    expected: Dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Raise unless results are the expected ones, to their rounding."""
    # Of the arithmetic, and of what is kept in the activations' dtype.
    small = 3 * TOLERANCE[plain.statistics_dtype(dtype)]
    for name, wanted in expected.items():
        size = wanted.abs()
        bound = small * (1 + size.max()) + TOLERANCE[dtype] * size
        check_close(name, results[name], wanted, bound)


def _wide(*tensors: Tensor):
    return (t.double().cpu() for t in tensors)


def waves(shape, step: float) -> Tensor:
    """Return numbers that look random enough, in [-1, 1]."""
    count = torch.Size(shape).numel()
    # On the CPU, whatever a `with torch.device(...)` around this says.
    index = torch.arange(1, count + 1, dtype=torch.float64, device='cpu')
    return index.mul(step).sin().view(shape)


def check_close(name: str, actual: Tensor, expected: Tensor, bound) -> None:
    """Raise unless a result is as near to the expected one as a bound."""
    if actual.shape != expected.shape:
        raise RuntimeError(
            f'{name}: shape {tuple(actual.shape)}, expected '
            f'{tuple(expected.shape)}'
        )
    error = (actual.double().cpu() - expected).abs()
    if not (error <= bound).all():  # NaN is not, either
        raise RuntimeError(
            f'{name}: off by up to {error.max():.2g}, '
            f'{(error / bound).max():.2g} times what rounding allows'
        )


def check_layout(result: Tensor, x: Tensor) -> None:
    """Raise unless a result has the dtype and the layout of ``x``."""
    if result.dtype != x.dtype:
        raise RuntimeError(f'{result.dtype} from {x.dtype}')
    if result._base is not None:
        raise RuntimeError('a view, which breaks the ReLU that follows')
    if memory_format(result) != memory_format(x):
        raise RuntimeError(f'{memory_format(result)} from {memory_format(x)}')
