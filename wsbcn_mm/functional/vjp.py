"""Values and what pulls their gradients back, in closed form or not."""

from functools import partial
from typing import Callable

import torch
from torch import Tensor


def vjp_of(function: Callable) -> Callable:
    """A function's ``vjp``, or what autograd makes of it."""
    return getattr(function, 'vjp', None) or partial(autograd_vjp, function)


def autograd_vjp(
    function: Callable, mean: Tensor, var: Tensor, *parameters: Tensor
):
    """What a gradient in closed form would give, by autograd."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (mean, var)]
        inputs += [
            p.detach().requires_grad_(p.requires_grad) for p in parameters
        ]
        scale, shift = function(*inputs)

    def pull_back(grad_scale: Tensor, grad_shift: Tensor):
        wanted = [t for t in inputs if t.requires_grad]
        grads = iter(
            torch.autograd.grad(
                (scale, shift),
                wanted,
                (grad_scale, grad_shift),
                retain_graph=True,
                materialize_grads=True,
            )
        )
        return tuple(next(grads) if t.requires_grad else None for t in inputs)

    return scale.detach(), shift.detach(), pull_back
