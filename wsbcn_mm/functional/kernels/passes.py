"""A backward pass, made of a backend's passes."""

import math
from types import ModuleType
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor


def backward(
    backend: ModuleType,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    pull_back: Callable[[Tensor, Tensor], Tuple[Optional[Tensor], ...]],
    wants_grad_x: bool = True,
) -> Tuple[Optional[Tensor], ...]:
    """The gradients of ``x`` and of the parameters of its coefficients.

    Args:
        backend (module): Whose passes to take.
        grad, x (Tensor): The gradient of the result, and the activations.
        mean, scale (Tensor): Of ``(x - mean) * scale + shift``.
        pull_back (Callable): From the gradients of scale and shift to those
            of the moments and the parameters.
        wants_grad_x (bool): Whether to compute the gradient of ``x``.
    """
    grad_shift, grad_scale = backend.reduce(grad, x, mean)
    grad_mean, grad_var, *grad_parameters = pull_back(grad_scale, grad_shift)
    grad_x = None
    if wants_grad_x:
        length = max(math.prod(x.shape[2:]), 1)
        # The centre is the mean as well: d/dm of (x - m) * scale.
        offset = torch.addcmul(grad_mean, scale, grad_shift, value=-1)
        grad_x = backend.input_grad(
            grad,
            x,
            mean,
            scale,
            grad_var * (2 / length),
            offset / length,
        )
    return grad_x, *grad_parameters
