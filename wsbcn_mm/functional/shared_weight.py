"""One value of a function of parameters, for several calls."""

from contextlib import ExitStack
from typing import Callable

import torch
from torch import Tensor


class SharedWeight:
    """A function of parameters, computed once for any number of calls.

    Each call gives an alias of the one value, with a node of its own in the
    autograd graph. Handing out the value with its graph instead would break
    a second backward pass, and activation checkpointing, which counts the
    tensors that a forward pass saves.

    A backward pass ends the sharing (``is_open``): what comes after it belongs
    to another step, for which even an optimizer that hides from autograd's
    version counters may have changed the tensors.

    Args:
        function (Callable): A differentiable, pure function of tensors.
        *tensors (Tensor): What it is computed from. They must not change
            while the value is in use.

    Example:
        >>> parameter = torch.ones(2, requires_grad=True)
        >>> shared = SharedWeight(torch.exp, parameter)
        >>> (shared(parameter) + shared(parameter)).sum().backward()
        >>> parameter.grad
        tensor([5.4366, 5.4366])
    """

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor):
        self.function = function
        self.is_open = True
        # A graph of its own, which holds in every mode, and whose saved
        # tensors are no business of the hooks around this call.
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            modes.enter_context(
                torch.autograd.graph.saved_tensors_hooks(_same, _same)
            )
            self.tensors = [
                t.detach().requires_grad_(t.requires_grad) for t in tensors
            ]
            self.value = function(*self.tensors)

    def __call__(self, *tensors: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.value.requires_grad:
            return _UseSharedWeight.apply(self, *tensors)
        return self.value.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _UseSharedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shared, *tensors):
        ctx.shared = shared
        ctx.save_for_backward(*tensors)
        return shared.value.detach()

    @staticmethod
    def backward(ctx, grad):
        shared, wanted = ctx.shared, ctx.needs_input_grad[1:]
        shared.is_open = False
        output, inputs = shared.value, shared.tensors
        again = torch.is_grad_enabled()
        if again:  # create_graph: a gradient of gradients
            inputs = ctx.saved_tensors
            output = shared.function(*inputs)
        grads = iter(
            torch.autograd.grad(
                output,
                [t for t, w in zip(inputs, wanted) if w],
                grad,
                retain_graph=True,
                create_graph=again,
            )
        )
        return None, *(next(grads) if w else None for w in wanted)
