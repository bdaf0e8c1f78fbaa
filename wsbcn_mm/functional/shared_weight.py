"""One value of a function of parameters, for several calls."""

from contextlib import ExitStack
from typing import Callable, Optional, Tuple

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
        function (Callable): A differentiable, pure function of tensors. With
            an attribute ``vjp``, a function of the same and of a dtype to the
            value in that dtype and to what pulls its gradient back, autograd
            does not differentiate it.
        *tensors (Tensor): What it is computed from. They must not change
            while the value is in use.
        dtype (torch.dtype | None): Of the value. Default: None, the first
            tensor's.
        **settings: Other arguments of the function.

    Example:
        >>> parameter = torch.ones(2, requires_grad=True)
        >>> shared = SharedWeight(torch.exp, parameter)
        >>> (shared(parameter) + shared(parameter)).sum().backward()
        >>> parameter.grad
        tensor([5.4366, 5.4366])
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *tensors: Tensor,
        dtype: Optional[torch.dtype] = None,
        **settings,
    ):
        self.function, self.settings = function, settings
        self.dtype = dtype or tensors[0].dtype
        self.is_open = True
        self.wants_grad = any(t.requires_grad for t in tensors)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # a value for every mode
                self._compute(tensors)
        else:
            self._compute(tensors)

    def __call__(self, *tensors: Tensor) -> Tensor:
        if self.wants_grad and torch.is_grad_enabled():
            return _UseSharedWeight.apply(self, *tensors)
        return self.value.detach()

    def pulled_back(self, grad: Tensor) -> Tuple[Tensor, ...]:
        """The gradients of the tensors, each once or None."""
        grads = self._pull_back(grad)
        return grads if isinstance(grads, tuple) else (grads,)

    def recomputed(self, *tensors: Tensor) -> Tensor:
        """The value with a graph, to be differentiated again."""
        return self.function(*tensors, **self.settings).to(self.dtype)

    def _compute(self, tensors: Tuple[Tensor, ...]) -> None:
        # Both hold on to the memory, whatever becomes of the parameters.
        leaves = [t.detach() for t in tensors]
        if hasattr(self.function, 'vjp'):
            self.value, self._pull_back = self.function.vjp(
                *leaves, dtype=self.dtype, **self.settings
            )
        else:
            wanted = [t.requires_grad for t in tensors]
            self.value, self._pull_back = self._traced(leaves, wanted)

    def _traced(self, leaves, wanted):
        for leaf, w in zip(leaves, wanted):
            leaf.requires_grad_(w)
        with ExitStack() as modes:
            modes.enter_context(torch.enable_grad())
            # Saved tensors that are no business of the hooks around this, and
            # without the graph that they would hold on to as its outputs.
            modes.enter_context(
                torch.autograd.graph.saved_tensors_hooks(
                    torch.Tensor.detach, _same
                )
            )
            value = self.recomputed(*leaves)

        def pull_back(grad: Tensor) -> Tuple[Tensor, ...]:
            grads = iter(
                torch.autograd.grad(
                    value,
                    [leaf for leaf, w in zip(leaves, wanted) if w],
                    grad,
                    retain_graph=True,
                )
            )
            return tuple(next(grads) if w else None for w in wanted)

        return value.detach(), pull_back


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _UseSharedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shared, *tensors):
        ctx.shared = shared
        # Also to be told if one is edited before the backward pass.
        ctx.save_for_backward(*tensors)
        return shared.value.detach()

    @staticmethod
    def backward(ctx, grad):
        shared, tensors = ctx.shared, ctx.saved_tensors
        shared.is_open = False
        if not torch.is_grad_enabled():
            return None, *shared.pulled_back(grad)
        wanted = ctx.needs_input_grad[1:]  # create_graph
        grads = iter(
            torch.autograd.grad(
                shared.recomputed(*tensors),
                [t for t, w in zip(tensors, wanted) if w],
                grad,
                create_graph=True,
            )
        )
        return None, *(next(grads) if w else None for w in wanted)
