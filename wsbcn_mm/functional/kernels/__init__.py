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

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

from ..transforms import is_transformed
from . import cpu, cuda, plain
from .closed_form import Gradient
from .parity import check_first_use
from .passes import backward
from .plain import statistics_dtype

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
_CHOSEN = {}  # by use()


def select(x: torch.Tensor) -> ModuleType:
    """The fastest backend for ``x``."""
    if is_transformed(x) or x.numel() == 0:
        # What follows the operations needs the definition, and no kernel
        # copes with nothing.
        return plain
    if x.device.type in _CHOSEN:
        return _CHOSEN[x.device.type]
    return _first_that_works(x.device, x.dtype)


@lru_cache(maxsize=None)
def _first_that_works(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend of a device that computes there what the definition does.

    Triton's kernels are compiled at their first use, which takes a C compiler
    and a version of Triton that supports the device: not every machine has
    them, and none should end a training for that, or falsify it.
    """
    for name in _BACKENDS.get(device.type, []):
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
            warnings.warn(
                f'wsbcn_mm: the {name!r} kernels do not work here for '
                f'{dtype} on {device}, and slower ones take their place: '
                f'{type(error).__name__}: {error}',
                stacklevel=2,
            )
    return plain


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
