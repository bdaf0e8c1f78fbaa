"""What MMEngine 0.10 lacks to load its own checkpoints, and our configs.

Since torch 2.6 ``torch.load`` builds only what is known to be harmless. The
checkpoints that MMEngine writes hold more than tensors: ``HistoryBuffer`` (the
curves in the log), NumPy arrays and scalars, and, as an accident of pickling,
``getattr``. So testing, resuming and ``load_from`` fail on them.

Switching the safety off, or declaring those names safe as they are, would let
a checkpoint run code. ``getattr`` reaches anything. ``numpy.dtype`` with a
crafted state makes an array take the file's bytes for pointers to objects. A
crafted ``HistoryBuffer`` replaces the methods of all others. So each of those
names gets a stand-in here that builds numbers, checks them, and refuses the
rest. The stand-ins are torch's only while MMEngine, or a tool here, reads a
checkpoint: what a process declares safe by itself, it finds as it was.
"""

import contextlib
import functools
import math
import re
from importlib import metadata
from importlib.util import find_spec
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.optim.optimizer import optimizer_wrapper
from mmengine.runner import checkpoint
from mmengine.utils import digit_version
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers._base import NormBase
from .checkpoint_errors import explained


class _Dtype:
    """Stands in for ``numpy.dtype``: of numbers, in either byte order."""

    def __init__(self, code, align=False, copy=False):
        if not (isinstance(code, str) and re.fullmatch(r'[biufc]\d+', code)):
            raise UnpicklingError(
                'a NumPy array in a checkpoint must hold numbers, '
                f'got {code!r}'
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        byte_order = state[1]
        if byte_order not in ('|', '=', '<', '>'):
            raise UnpicklingError(f'unknown byte order {byte_order!r}')
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array(np.ndarray):
    """Stands in for ``numpy.ndarray``: a plain one in all but its origin."""

    __array_priority__ = -1.0  # what is computed from it is plain

    def __new__(cls):
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state):
        version, shape, dtype, fortran, data = state
        if not (
            version == 1
            and isinstance(dtype, _Dtype)
            and isinstance(data, bytes)
            and all(isinstance(size, int) and size >= 0 for size in shape)
            and math.prod(shape) * dtype.dtype.itemsize == len(data)
        ):
            raise UnpicklingError(
                'a NumPy array in a checkpoint must be the bytes of its '
                f'numbers, got another state of shape {shape}'
            )
        super().__setstate__(
            (1, tuple(shape), dtype.dtype, bool(fortran), data)
        )

    def __reduce__(self):  # a new checkpoint does not depend on this package
        return np.asarray(self).__reduce__()


def _reconstruct(array_type, shape, code):
    """Stands in for the function that makes an array to be filled."""
    if not (isinstance(array_type, type) and issubclass(array_type, _Array)):
        raise UnpicklingError(f'expected a NumPy array, got {array_type!r}')
    return array_type()


def _scalar(dtype, data):
    """Stands in for the function that makes a NumPy number."""
    if not (
        isinstance(dtype, _Dtype)
        and isinstance(data, bytes)
        and len(data) == dtype.dtype.itemsize
    ):
        raise UnpicklingError(
            'a NumPy scalar in a checkpoint must be the bytes of a number'
        )
    return np.frombuffer(data, dtype.dtype)[0]


class _HistoryBuffer(HistoryBuffer):
    """Stands in for ``HistoryBuffer``, and is one once it has been filled."""

    def __setstate__(self, state):
        values, counts = state['_log_history'], state['_count_history']
        if not (isinstance(values, _Array) and isinstance(counts, _Array)):
            raise UnpicklingError(
                'a HistoryBuffer in a checkpoint must hold two arrays, got '
                f'{type(values).__name__} and {type(counts).__name__}'
            )
        self.__class__ = HistoryBuffer
        # Its methods are its class's, not those that the file names.
        self.__init__(values, counts, int(state['max_length']))


def _statistics_method(owner, name):
    """Stands in for ``getattr``: a HistoryBuffer's methods, nothing else."""
    if not (
        isinstance(owner, type)
        and issubclass(owner, _HistoryBuffer)
        and name in ('min', 'max', 'current', 'mean')
    ):
        raise UnpicklingError(f'refused: getattr({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)


def _encode(text, encoding):
    """Stands in for ``codecs.encode``, by which pickle writes bytes."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise UnpicklingError(f'refused: encode to {encoding!r}')
    return text.encode(encoding)


# Since then weights_only is the default of torch.load, and what is declared
# safe may have another name than its own.
REFUSES_BY_DEFAULT = digit_version(torch.__version__) >= digit_version('2.6')
STAND_INS = {
    'mmengine.logging.history_buffer.HistoryBuffer': _HistoryBuffer,
    'builtins.getattr': _statistics_method,
    'builtins.bytes': bytes,  # how pickle writes the bytes of no numbers
    '_codecs.encode': _encode,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
}
for _core in ('numpy._core', 'numpy.core'):  # NumPy 2 and 1
    STAND_INS[f'{_core}.multiarray._reconstruct'] = _reconstruct
    STAND_INS[f'{_core}.multiarray.scalar'] = _scalar


@contextlib.contextmanager
def mmengine_checkpoints():
    """Let ``torch.load(weights_only=True)`` read MMEngine's checkpoints.

    Inside, the stand-ins take the place of whatever is declared safe under
    their names, since torch would choose one of several by chance. Afterwards
    everything is as it was. What is safe is so for a whole process: loads of
    other threads meet the stand-ins meanwhile.

    Example:
        >>> with mmengine_checkpoints():  # doctest: +SKIP
        ...     checkpoint = torch.load('epoch_1.pth', weights_only=True)
    """
    declared = torch.serialization.get_safe_globals()
    others = [entry for entry in declared if _name(entry) not in STAND_INS]
    _declare(others + [_entry(*named) for named in STAND_INS.items()])
    try:
        yield
    finally:
        _declare(declared)


def _entry(name: str, stand_in):
    """What torch is to be told to take for a name."""
    if REFUSES_BY_DEFAULT:
        return stand_in, name
    module, _, name = name.rpartition('.')
    if isinstance(stand_in, type):
        return type(name, (stand_in,), dict(__module__=module))

    def twin(*args):
        return stand_in(*args)

    twin.__module__, twin.__name__ = module, name
    return twin


def _name(entry) -> str:
    """Under which name torch takes what has been declared safe."""
    if isinstance(entry, tuple):
        return entry[1]
    return f'{entry.__module__}.{entry.__qualname__}'


def _declare(entries: list) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(entries)


def allow_mmengine_checkpoints() -> None:
    """Let MMEngine read its own checkpoints, with torch's safety on.

    Where a checkpoint cannot be read or downloaded, say why in one line.
    """
    # The one door of testing, resuming, load_from and init_cfg.
    door = checkpoint.CheckpointLoader.load_checkpoint.__func__
    if not hasattr(door, 'reads_mmengine_checkpoints'):

        @functools.wraps(door)
        def load_checkpoint(cls, filename, *args, **kwargs):
            with mmengine_checkpoints(), explained(filename):
                return door(cls, filename, *args, **kwargs)

        load_checkpoint.reads_mmengine_checkpoints = True
        checkpoint.CheckpointLoader.load_checkpoint = classmethod(
            load_checkpoint
        )
    # The maintained fork declares the names themselves safe, ``getattr`` too,
    # and loads whatever torch refuses with code execution.
    if hasattr(checkpoint, '_safe_torch_load'):
        checkpoint._safe_torch_load = torch.load


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has a Batch Normalization other than ours."""
    return any(
        isinstance(module, _BatchNorm) and not isinstance(module, NormBase)
        for module in model.modules()
    )


def register_configs() -> None:
    """Make ``_base_ = 'wsbcn_mm::...'`` resolve; ``'mmseg::...'`` anywhere."""
    # MMEngine looks for the distribution mmsegmentation where a config says
    # mmseg::. The maintained fork's has another name: find it by its module.
    for module, package in MODULE2PACKAGE.items():
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            if not find_spec(package) and find_spec(module):
                MODULE2PACKAGE[module] = module
    # Not the distribution's name: MMEngine would look for the configs where
    # its metadata lies, which an editable install keeps elsewhere. Of a
    # module it takes the folder.
    MODULE2PACKAGE.setdefault('wsbcn_mm', 'wsbcn_mm.version')


allow_mmengine_checkpoints()
register_configs()
# It warns of gradient accumulation, which is what our layers are made for.
optimizer_wrapper.has_batch_norm = has_batch_norm
