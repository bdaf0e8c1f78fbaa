"""A stand-in for Triton's CUDA driver: it compiles, and launches nothing."""

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        pass


class _Driver(DriverBase):
    """A GPU that every tensor of the processor is on."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),
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
