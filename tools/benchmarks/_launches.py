"""What a GPU would be told to do, counted where there is none."""

from contextlib import contextmanager
from unittest import mock

from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
)

from wsbcn_mm.functional.kernels.launch import Launch


class Launches(TorchDispatchMode):
    """The names of Triton's kernels and of PyTorch's operations.

    Neither views nor new tensors are among them. An operation counts once,
    though some are several kernels.
    """

    NOTHING = {'_unsafe_view', 'empty', 'empty_like', 'new_empty'}

    def __init__(self):
        super().__init__()
        self.names = []

    @contextmanager
    def counted(self):
        call = Launch.__call__

        def counting(launch, *tensors, **kwargs):
            self.names.append(launch.kernel.jit.fn.__name__)
            with _disable_current_modes():  # the interpreter's operations
                call(launch, *tensors, **kwargs)

        with self, mock.patch.object(Launch, '__call__', counting):
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        is_view = alias is not None and not alias.is_write
        if not is_view and name not in self.NOTHING:
            self.names.append(name)
        return func(*args, **kwargs or {})
