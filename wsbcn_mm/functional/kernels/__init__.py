"""The passes over activations, and the one place that chooses between them.

A backend is a module with four functions, each one pass over memory. ``x``
has shape (N, C, *), the small tensors have shape (N, C) and the dtype that
:func:`statistics_dtype` gives:

- ``moments(x) -> mean, var``
- ``affine(x, center, scale, shift) -> (x - center) * scale + shift``
- ``reduce(grad, x, center) -> sum(grad), sum(grad * (x - center))``
- ``input_grad(grad, x, center, scale, slope, offset) ->
  grad * scale + (x - center) * slope + offset``

two for the small tensors:

- ``batch_channel``, Batch-Channel Normalization's coefficients and their
  gradient
- ``moved_estimates``, its estimates after a batch

and one for weights:

- ``standardize_weight``, Weight Standardization and its gradient

It may have ``batch_channel_backward`` too, a whole backward pass that reads
memory less often than :func:`backward`, and ``batch_channel_forward``, a whole
training forward, which moves estimates in place.

There are ``plain``, the definition; for processors ``compiled``, our own in
C++, and ``cpu``, PyTorch's operations; for CUDA ``fused``, our own in Triton,
and ``cuda``, PyTorch's kernels.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Dict, List, Tuple

import torch

from ..transforms import is_transformed
from . import cpu, cuda, plain
from .closed_form import Gradient
from .passes import backward
from .plain import statistics_dtype
from .self_check import check_first_use

__all__ = [
    'Gradient',
    'backward',
    'cpu',
    'cuda',
    'plain',
    'select',
    'statistics_dtype',
    'use',
]

# By preference. None of CUDA's has been timed on a GPU so far:
# tools/benchmarks/run_all.sh does.
_BACKENDS = {'cpu': ['compiled', 'cpu'], 'cuda': ['fused', 'cuda']}
_NEEDS_NO_CHECK = ('cpu',)  # PyTorch's own operations
_SWITCH = 'WSBCN_MM_DISABLE_KERNELS'  # environment variable: names of them
_CHOSEN: Dict[str, ModuleType] = {}  # by use()
_FOUND: Dict[Tuple[torch.device, torch.dtype], ModuleType] = {}


def select(x: torch.Tensor) -> ModuleType:
    """The fastest backend for ``x``."""
    if is_transformed(x) or x.numel() == 0:
        # What follows the operations needs the definition, and no kernel
        # copes with nothing.
        return plain
    device = x.device
    if _CHOSEN and device.type in _CHOSEN:
        return _CHOSEN[device.type]
    return _FOUND.get((device, x.dtype)) or _find(device, x.dtype)


def _find(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Find a device's backend, unless this is no time to try one.

    What is captured for a CUDA graph does not run, so nothing can be compared
    there, and waiting for a result would end the capture.
    """
    if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        warnings.warn(
            'wsbcn_mm: the first use of its kernels for '
            f'{dtype} on {device} is in the capture of a CUDA graph, where '
            "they cannot be checked: PyTorch's operations are captured, which "
            'are slower. Run the same a few times before the capture.',
            stacklevel=3,
        )
        return plain
    found = _FOUND[device, dtype] = _first_that_works(device, dtype)
    return found


def _first_that_works(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend of a device that computes there what the definition does.

    Triton's kernels are compiled at their first use, which takes a C compiler
    and a version of Triton that supports the device: not every machine has
    them, and none should end a training for that, or falsify it. A fault that
    costs the process its CUDA context does end it. Only a second process
    would outlive such a fault, and each training would wait for that one to
    import torch and take some 0.5 GB of every GPU.
    """
    for name in _allowed(device.type):
        try:
            backend = import_module(f'.{name}', __name__)
            if not getattr(backend, 'is_built', True):
                continue
            if name not in _NEEDS_NO_CHECK:
                # Inference mode, autocast, the hooks of activation
                # checkpointing: whatever is around the first use is so for
                # its thread. In one of its own the check meets none of it.
                with ThreadPoolExecutor(1) as thread:
                    thread.submit(
                        check_first_use, backend, device, dtype
                    ).result()
            return backend
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            _raise_if_lost(device, name, error)
            warnings.warn(
                f'wsbcn_mm: the {name!r} kernels do not work here for '
                f'{dtype} on {device}, and slower ones take their place: '
                f'{type(error).__name__}: {error}',
                stacklevel=4,
            )
    return plain


def _allowed(device_type: str) -> List[str]:
    """Names of a device's backends, but for those that are disabled."""
    value = os.environ.get(_SWITCH, '')
    disabled = {name.strip() for name in value.split(',')} - {''}
    known = {name for names in _BACKENDS.values() for name in names}
    if not disabled <= known:
        raise ValueError(
            f'{_SWITCH}={value}: expected names of kernels, separated by '
            f'commas, among {", ".join(sorted(known))}'
        )
    return [n for n in _BACKENDS.get(device_type, []) if n not in disabled]


def _raise_if_lost(device: torch.device, name: str, error: Exception) -> None:
    """Raise if CUDA does nothing more in this process after an error."""
    if device.type != 'cuda':
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise RuntimeError(
            f'wsbcn_mm: the {name!r} kernels failed at their first use on '
            f'{device} in a way that CUDA does not recover from in this '
            'process. Start it again without them, with the environment '
            f'variable {_SWITCH}={name}, and report this: {error}'
        ) from error


@contextmanager
def use(device_type: str, backend: ModuleType):
    """Choose a backend for a while: to compare them."""
    before = _CHOSEN.get(device_type)
    _CHOSEN[device_type] = backend
    try:
        yield
    finally:
        if before is None:
            del _CHOSEN[device_type]
        else:
            _CHOSEN[device_type] = before
