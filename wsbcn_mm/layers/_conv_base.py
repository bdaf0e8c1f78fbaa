"""What convolutions with a function of their weight share."""

import weakref
from typing import Any, Callable, Dict, Tuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional import SharedWeight, is_transformed
from .fusion import GuardedParameters

# The advice of the constructor, by which others know its error.
PLAIN_CONVOLUTION = 'Use a plain convolution here'

_optimizer_steps = 0


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers do not count a parameter's version up.
register_optimizer_step_post_hook(_count_optimizer_step)


def _are_plain(tensors: Tuple[Tensor, ...]) -> bool:
    """Whether all have the memory and the version of a parameter."""
    for t in tensors:
        # Another type may be in its place, as functional_call puts it.
        if type(t) is not Parameter or t.is_inference() or t.is_meta:
            return False
    return True


class ConvBase(GuardedParameters):
    """Mixin for a convolution that is done with a function of its weight.

    The function is computed once where it can be: in training for the calls of
    one step that share a backward pass, as those of a head that several levels
    share, and in evaluation until a parameter changes. A change is seen by
    autograd's version counter and the memory's address, which tell of
    ``load_state_dict``, ``.to()`` and every in-place edit but one through
    ``parameter.data``; steps of optimizers are counted. For what is hidden, a
    backward pass, ``train()`` and ``eval()`` start afresh: MMEngine, which
    swaps parameters for their moving average by ``.data``, calls one of them
    after. Whoever edits ``parameter.data`` between two calls in evaluation
    must do so too; in training without gradients, as a momentum encoder's,
    every call computes anew.

    Attributes:
        min_fan_in (int): How many weights the smallest filter has that the
            function leaves anything of.
    """

    min_fan_in = 2

    def __init__(self, *args, device=None, dtype=None, **kwargs):
        for name, value in (('device', device), ('dtype', dtype)):
            if value is not None:
                kwargs[name] = value
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < self.min_fan_in:
            raise ValueError(
                f'{type(self).__name__}: nothing would be left of a filter '
                f'of one weight; got in_channels={self.in_channels}, '
                f'groups={self.groups}, kernel_size={self.kernel_size}. '
                f'{PLAIN_CONVOLUTION}.'
            )

    def weight_function(
        self,
    ) -> Tuple[Callable[..., Tensor], Tuple[Tensor, ...], Dict[str, Any]]:
        """What to compute the weight with.

        Returns:
            tuple: A pure function, its tensors, and its other arguments.
        """
        raise NotImplementedError

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution is done with."""
        function, tensors, settings = self.weight_function()
        if is_transformed(*tensors) or not _are_plain(tensors):
            return function(*tensors, **settings)
        dtype = self._working_dtype()
        # An address is not used again while the shared weight is kept: it
        # holds on to the parameter's memory.
        key = [dtype, settings, _optimizer_steps]
        for t in tensors:
            key += (
                t.data_ptr(),
                t._version,
                t.requires_grad,
                t.dtype,
                t.stride(),
            )
        known, shared = self.__dict__.get('_shared_weight', (None, None))
        if isinstance(shared, weakref.ref):
            shared = shared()
        if shared is None or known != key or not shared.is_open:
            shared = SharedWeight(function, *tensors, dtype=dtype, **settings)
            # In training the graphs keep it, and nothing else: a momentum
            # encoder has none, and is edited through parameter.data.
            self.__dict__['_shared_weight'] = (
                key,
                weakref.ref(shared) if self.training else shared,
            )
        return shared(*tensors)

    def _working_dtype(self) -> torch.dtype:
        """That of the convolution: autocast then casts nothing more."""
        weight = self.weight
        device, dtype = weight.device.type, weight.dtype
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized_weight(), self.bias)

    def register_parameter(self, name: str, param) -> None:
        # Fusion gives the convolution a bias, and a scale that the function
        # of the weight would take out again: wrong outputs.
        is_new = name == 'bias' and self._parameters.get(name, 1) is None
        if is_new and param is not None:
            raise RuntimeError(
                f'{type(self).__name__}: a bias is being added, as where a '
                'normalization is fused into a convolution. This one '
                'standardizes its weight, so the outputs would be wrong. Use '
                'wsbcn_mm.fold_for_inference(model) instead, or build the '
                'convolution with bias=True.'
            )
        super().register_parameter(name, param)

    def _forget(self) -> None:
        self.__dict__.pop('_shared_weight', None)

    def train(self, mode: bool = True):
        self._forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop('_shared_weight', None)
        return state
