"""A stand-in for Triton's CUDA driver: it compiles, and launches nothing."""

from types import SimpleNamespace

import torch
import triton
from torch.torch_version import TorchVersion
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

# A module, a function, its registers and spills, and since then most threads.
_HAS_MOST_THREADS = TorchVersion(triton.__version__) >= '3.4'
_LOADED = (0, 0, 0, 0, *[1024] * _HAS_MOST_THREADS)


class _Launcher:
    def __init__(self, source, metadata):
        # The grid, the stream, the function, its metadata, and the hooks.
        self._count = 9 + len(source.signature)

    def __call__(self, *arguments):
        if len(arguments) != self._count:
            raise TypeError(
                f'{len(arguments)} arguments, {self._count} expected'
            )


class _Driver(DriverBase):
    """A GPU that every tensor of the processor is on."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: _LOADED,
        get_device_properties=lambda device: dict(max_shared_mem=232448),
    )

    def __init__(self, capability: int):
        self._target = GPUTarget('cuda', capability, 32)

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self._target

    def get_active_torch_device(self):
        return torch.device('cpu')

    def get_benchmarker(self):
        raise NotImplementedError('nothing runs here')


def install(capability: int = 90) -> None:
    """Let Triton compile for such a GPU in this process, and launch nowhere.

    What its kernels were to write stays as it is, whatever that was.
    """
    driver.set_active(_Driver(capability))
