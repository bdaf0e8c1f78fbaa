"""How a Triton kernel is launched."""

from functools import lru_cache, partial, reduce
from operator import or_
from typing import Callable, Dict, List, Sequence, Tuple

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion

# Before, what was compiled wanted no constants among its arguments.
_TAKES_CONSTANTS = TorchVersion(triton.__version__) >= '3.3'


class Kernel:
    """A Triton kernel, and what was compiled of it.

    Args:
        function (Callable): Tensors, numbers and constants, in this order.
        numbers (Sequence[str]): The names of its numbers.
    """

    def __init__(self, function: Callable, numbers: Sequence[str]):
        self.jit = triton.jit(function, do_not_specialize=list(numbers))
        self.compiled: Dict[tuple, Callable] = {}


def kernel(*numbers: str) -> Callable[[Callable], Kernel]:
    """Make a :class:`Kernel` with these numbers of a function."""
    return lambda function: Kernel(function, numbers)


class Launch:
    """A launch with all of its arguments but the tensors.

    Triton looks at every argument of every launch to tell which code it is
    for, which on small layers takes the processor longer than the GPU is busy.
    Here it is asked once for each kind of launch: device, dtypes, constants,
    warps. Nothing else makes a difference: code is the same for all numbers,
    and for all tensors that begin at a multiple of 16 bytes. For one that does
    not, Triton is asked each time.

    Of the tensors only the addresses are looked at, so they must be of the
    same dtypes and on the same device each time: :func:`planned` sees to that.

    Args:
        kernel (Kernel): What is launched.
        programs (int): How many of it.
        numbers (tuple): Numbers, or the first of them.
        constants (tuple): Constants.
        num_warps (int): Of a program. Default: 4
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: int,
        numbers: tuple,
        constants: tuple,
        num_warps: int = 4,
    ):
        self.kernel, self.programs = kernel, programs
        self.numbers, self.constants = numbers, constants
        self.num_warps = num_warps
        self._rest = constants if _TAKES_CONSTANTS else ()
        self._run = None

    def __call__(self, *tensors: Tensor, numbers: tuple = ()) -> None:
        """Launch it, with the last of the numbers."""
        addresses = [t.data_ptr() for t in tensors]
        if reduce(or_, addresses) % 16:
            self._ask_triton(tensors, numbers)
        elif self._run is not None or self._find(tensors, numbers):
            self._run(*addresses, *self.numbers, *numbers, *self._rest)

    def _find(self, tensors: Tuple[Tensor, ...], numbers: tuple) -> bool:
        """Whether it was compiled already. If not, it is launched."""
        key = (
            tensors[0].device,
            self.constants,
            self.num_warps,
            *[t.dtype for t in tensors],
        )
        compiled = found = self.kernel.compiled.get(key)
        if compiled is None:
            compiled = self._ask_triton(tensors, numbers)
        if compiled is not None:  # the interpreter compiles nothing
            self.kernel.compiled[key] = compiled
            self._run = compiled[self.programs, 1, 1]
        return found is not None

    def _ask_triton(self, tensors: Tuple[Tensor, ...], numbers: tuple):
        return self.kernel.jit[self.programs,](
            *(*tensors, *self.numbers, *numbers, *self.constants),
            num_warps=self.num_warps,
        )


class Buffer:
    """Small tensors in one allocation.

    Each begins at a multiple of 16 bytes, as an allocation of its own would:
    see :class:`Launch`.

    Args:
        sizes (Sequence[int]): Their numbers of elements.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes: List[int] = []
        self._places = []
        for size in sizes:
            self._places.append(len(self._sizes))
            self._sizes.append(size)
            if size % 4:
                self._sizes.append(-size % 4)
        self._size = sum(self._sizes)
        self._has_gaps = len(self._sizes) > len(self._places)

    def allocate(self, like: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return the tensors, of this dtype, on the device of another one."""
        buffer = like.new_empty(self._size, dtype=dtype)
        parts = buffer.split_with_sizes(self._sizes)
        if self._has_gaps:
            return [parts[place] for place in self._places]
        return parts


def planned(plan: Callable) -> Callable:
    """Work out launches once for each kind of tensors and settings.

    Args:
        plan (Callable): Makes launches from the shape and the dtype of the
            first tensor, whether it is contiguous, and settings.

    Returns:
        Callable: The same from tensors, all that are not allocated in
        between, and settings.
    """
    cached = lru_cache(maxsize=1024)(
        lambda shape, is_contiguous, kind, settings: plan(
            shape, kind[1], is_contiguous, *settings
        )
    )

    def of(*tensors: Tensor, settings: tuple = ()):
        x = tensors[0]
        devices = [t.device for t in tensors]
        if devices.count(devices[0]) < len(devices):
            raise RuntimeError(
                'expected all tensors to be on the same device, got an input '
                f'on {devices[0]} and others on '
                f'{", ".join(sorted({str(d) for d in devices[1:]}))}'
            )
        kind = devices[0], *[t.dtype for t in tensors]
        return cached(x.shape, x.is_contiguous(), kind, settings)

    return of


def power_of_2(count: int) -> int:
    """The next one, sooner than ``triton.next_power_of_2`` has it."""
    return 1 << (count - 1).bit_length()


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
