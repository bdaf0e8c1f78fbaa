import torch
from torch import Tensor


def is_transformed(*tensors: Tensor) -> bool:
    """Whether something follows the operations, besides autograd.

    A compiler, an exporter, a ``torch.func`` transform or a tensor subclass
    shall see the plain definition, which it differentiates, batches or fuses
    itself: our own kernels and backward passes are closed to it, and a cache
    would leak its stand-in tensors.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(
            type(t) not in (Tensor, torch.nn.Parameter)
            or torch._C._functorch.is_functorch_wrapped_tensor(t)
            for t in tensors
        )
    )
