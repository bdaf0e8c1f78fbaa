import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_functorch(tensor: Tensor) -> bool:
    """Whether a ``torch.func`` transform follows what is done to a tensor."""
    return not torch.compiler.is_compiling() and _is_wrapped(tensor)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether something follows the operations, besides autograd.

    A compiler, an exporter, a ``torch.func`` transform or a tensor subclass
    shall see the plain definition, which it differentiates, batches or fuses
    itself: our own kernels and backward passes are closed to it, and a cache
    would leak its stand-in tensors.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    for tensor in tensors:
        if type(tensor) not in _PLAIN or _is_wrapped(tensor):
            return True
    return False


@torch.library.custom_op('wsbcn_mm::snapshot', mutates_args=())
def snapshot(tensor: Tensor) -> Tensor:
    """A copy that a compiler does not take again after an in-place edit.

    Inductor may compute a value anew in the backward pass, from a buffer that
    the forward pass has changed since; what is opaque to it, it keeps.
    """
    return tensor.clone()


@snapshot.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)
