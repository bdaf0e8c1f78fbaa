from typing import Optional

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


def dense(x: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """``x``, or a copy in the layout a kernel works in, its or another's.

    Nor is it a view that torch negates as it reads it.
    """
    layout = memory_format(x if like is None else like)
    return x.contiguous(memory_format=layout).resolve_neg()
