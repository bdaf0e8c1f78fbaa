"""Where Triton launches a kernel."""

from functools import wraps
from typing import Callable

import torch
from torch import Tensor


def on_its_device(function: Callable) -> Callable:
    """Make the device of a function's first tensor the current one.

    PyTorch's operations run where their tensors are. Triton launches on the
    current device, which need not be that: ``init_detector(...,
    device='cuda:1')`` leaves it at the first.
    """

    @wraps(function)
    def launch(tensor: Tensor, *args, **kwargs):
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return launch
