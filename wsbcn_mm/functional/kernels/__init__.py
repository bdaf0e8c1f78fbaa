"""The passes over activations, and the one place that chooses between them.

A backend is a module with four functions, each one pass over memory. ``x``
has shape (N, C, *), the small tensors have shape (N, C) and the dtype that
:func:`statistics_dtype` gives:

- ``moments(x) -> mean, var``
- ``affine(x, center, scale, shift) -> (x - center) * scale + shift``
- ``reduce(grad, x, center) -> sum(grad), sum(grad * (x - center))``
- ``input_grad(grad, x, center, scale, slope, offset) ->
  grad * scale + (x - center) * slope + offset``

There are ``plain`` (the definition), ``cpu``, and for CUDA ``cuda`` (the
kernels in PyTorch) and ``fused`` (our own in Triton).
"""

from contextlib import contextmanager
from types import ModuleType

import torch

from ..transforms import is_transformed
from . import cpu, cuda, plain
from .plain import statistics_dtype

__all__ = ['cpu', 'cuda', 'plain', 'select', 'statistics_dtype', 'use']

_BACKENDS = {
    'cpu': cpu,
    # Neither 'cuda' nor 'fused' has been timed or tested on a GPU so far.
    # tools/benchmarks/run_all.sh does both: choose by what it says.
    'cuda': plain,
}


def select(x: torch.Tensor) -> ModuleType:
    """The fastest backend for ``x``."""
    if is_transformed(x) or x.numel() == 0:
        # What follows the operations needs the definition, and no kernel
        # copes with nothing.
        return plain
    return _BACKENDS.get(x.device.type, plain)


@contextmanager
def use(device_type: str, backend: ModuleType):
    """Choose a backend for a while: to compare them."""
    chosen = _BACKENDS.get(device_type, plain)
    _BACKENDS[device_type] = backend
    try:
        yield
    finally:
        _BACKENDS[device_type] = chosen
