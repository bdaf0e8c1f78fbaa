"""How a Triton kernel is launched."""

from functools import partial, reduce
from operator import or_
from typing import Callable, Dict, Sequence, Tuple

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion

# Before, what was compiled wanted no constants among its arguments.
_TAKES_CONSTANTS = TorchVersion(triton.__version__) >= '3.3'


class Kernel:
    """A Triton kernel, and what was compiled of it.

    Triton looks at every argument of every launch to tell which code it is
    for, which on small layers takes the processor longer than the GPU is busy.
    Here it is asked once for each kind of launch: device, dtypes, constants,
    warps. Nothing else makes a difference: code is the same for all numbers,
    and for all tensors that begin at a multiple of 16 bytes. For one that does
    not, Triton is asked each time.

    Args:
        function (Callable): Tensors, numbers and constants, in this order.
        numbers (Sequence[str]): The names of its numbers.
    """

    def __init__(self, function: Callable, numbers: Sequence[str]):
        self.jit = triton.jit(function, do_not_specialize=list(numbers))
        self._compiled: Dict[tuple, Callable] = {}

    def __call__(
        self,
        tensors: Tuple[Tensor, ...],
        programs: int,
        numbers: tuple,
        constants: tuple,
        num_warps: int = 4,
    ) -> None:
        """Launch so many programs, on the first tensor's device."""
        key = None
        if reduce(or_, [t.data_ptr() for t in tensors]) % 16 == 0:
            key = (
                tensors[0].device,
                constants,
                num_warps,
                *[t.dtype for t in tensors],
            )
            compiled = self._compiled.get(key)
            if compiled is not None:
                rest = constants if _TAKES_CONSTANTS else ()
                compiled[programs, 1, 1](*tensors, *numbers, *rest)
                return
        compiled = self.jit[programs,](
            *tensors, *numbers, *constants, num_warps=num_warps
        )
        # The interpreter compiles nothing.
        if key and compiled is not None:
            self._compiled[key] = compiled


def power_of_2(count: int) -> int:
    """The next one, sooner than ``triton.next_power_of_2`` has it."""
    return 1 << (count - 1).bit_length()


def kernel(*numbers: str) -> Callable[[Callable], Kernel]:
    """Make a :class:`Kernel` with these numbers of a function."""
    return lambda function: Kernel(function, numbers)


def on_its_device(function: Callable) -> Callable:
    """Make the device of a function's first tensor the current one.

    PyTorch's operations run where their tensors are. Triton launches on the
    current device, which need not be that: ``init_detector(...,
    device='cuda:1')`` leaves it at the first.
    """

    return partial(_launch, function)


def _launch(function: Callable, tensor: Tensor, *args, **kwargs):
    # The usual case, sooner than a guard that changes nothing.
    if tensor.is_cuda and torch.cuda.current_device() == tensor.get_device():
        return function(tensor, *args, **kwargs)
    with torch.cuda.device_of(tensor):
        return function(tensor, *args, **kwargs)
