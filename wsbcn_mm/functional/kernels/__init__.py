"""The passes over activations, and the one place that chooses between them.

A backend is a module with four functions, each one pass over memory. ``x``
has shape (N, C, *), the small tensors have shape (N, C) and the dtype that
:func:`statistics_dtype` gives:

- ``moments(x) -> mean, var``
- ``affine(x, center, scale, shift) -> (x - center) * scale + shift``
- ``reduce(grad, x, center) -> sum(grad), sum(grad * (x - center))``
- ``input_grad(grad, x, center, scale, slope, offset) ->
  grad * scale + (x - center) * slope + offset``
"""

import torch

from . import plain


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision keeps its statistics in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def select(x: torch.Tensor):
    """The fastest backend for ``x``."""
    return plain
