import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that a kernel works in: channels_last if ``x`` has it."""
    if not x.is_contiguous():
        for dim, layout in (
            (4, torch.channels_last),
            (5, torch.channels_last_3d),
        ):
            if x.dim() == dim and x.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if it has another layout."""
    return x.contiguous(memory_format=memory_format(x))
