"""Read and write checkpoint files, for the command-line tools."""

import hashlib
import os
import os.path as osp
import pickle
import tempfile
from collections import OrderedDict
from typing import Any, Dict

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor

from .command_line import UsageError, config_from_file
from .compat import mmengine_checkpoints


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint file without running code that is in it.

    Returns:
        dict: With ``state_dict`` and ``meta`` at least.

    Raises:
        UsageError: If it cannot be read, or holds no weights.
    """
    if not osp.isfile(path):
        raise UsageError(f'no checkpoint {path!r}')
    try:
        with mmengine_checkpoints():
            checkpoint = torch.load(
                path, map_location='cpu', weights_only=True
            )
    except Exception as error:  # bytes that are no pickle raise anything
        told = isinstance(
            error, (pickle.UnpicklingError, RuntimeError, OSError)
        )
        reason = (
            str(error).splitlines()[0]
            if told and str(error)
            else 'torch.save did not write it, or not all of it.'
        )
        raise UsageError(
            f'{path!r} cannot be read safely: {reason} Expected a checkpoint '
            'of tensors, as torch.save and the MM libraries write them.'
        ) from error
    if not isinstance(checkpoint, dict):
        raise UsageError(
            f'{path!r} holds a {type(checkpoint).__name__}; expected a '
            'checkpoint, a dict of tensors.'
        )
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), dict):
            state = checkpoint[key]
            break
    else:
        state = checkpoint
    if not any(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f'{path!r} holds no weights.')
    if state is checkpoint:
        checkpoint = {}
    checkpoint['state_dict'] = strip(state, 'module.')
    checkpoint.setdefault('meta', {})
    return checkpoint


def read_state_dict(path: str) -> Dict[str, Tensor]:
    """The weights of a checkpoint file: see :func:`read_checkpoint`."""
    return read_checkpoint(path)['state_dict']


def strip(state_dict: Dict[str, Tensor], prefix: str) -> OrderedDict:
    """Take a prefix off all keys if all have it, and off their metadata."""
    if not state_dict or not all(k.startswith(prefix) for k in state_dict):
        return state_dict
    return select(state_dict, prefix)


def select(state_dict: Dict[str, Tensor], prefix: str) -> OrderedDict:
    """The part of a state dict below ``prefix``, with its metadata."""
    result = OrderedDict(
        (key[len(prefix) :], value)
        for key, value in state_dict.items()
        if key.startswith(prefix)
    )
    metadata = getattr(state_dict, '_metadata', None)
    if metadata is not None:
        result._metadata = OrderedDict(
            (key[len(prefix) :], value)
            for key, value in metadata.items()
            if f'{key}.'.startswith(prefix)
        )
    return result


def publish(checkpoint: Dict[str, Any], out: str) -> str:
    """Write the weights of a checkpoint, with a hash in the file's name.

    Optimizer, schedules and logs are left out. The hash is that of the
    file, so ``sha256sum`` confirms a download.

    Returns:
        str: The path, ``<out without .pth>-<first 8 of sha256>.pth``.
    """
    stem = out[: -len('.pth')] if out.endswith('.pth') else out
    folder = osp.dirname(osp.abspath(stem))
    os.makedirs(folder, exist_ok=True)
    meta = {
        key: value
        for key, value in checkpoint.get('meta', {}).items()
        if key in ('cfg', 'dataset_meta', 'epoch', 'iter', 'seed')
    }
    content = dict(state_dict=checkpoint['state_dict'], meta=meta)
    handle, temporary = tempfile.mkstemp(dir=folder)
    os.close(handle)
    try:
        torch.save(content, temporary)
        with open(temporary, 'rb') as f:
            digest = hashlib.sha256(f.read()).hexdigest()
        path = f'{stem}-{digest[:8]}.pth'
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def read_config(path: str) -> Config:
    """Read a config and import the library that it is for."""
    import importlib

    if not osp.isfile(path):
        raise UsageError(f'no config {path!r}')
    cfg = config_from_file(path)
    if 'model' not in cfg:
        raise UsageError(f'{path!r} has no model.')
    scope = cfg.get('default_scope', 'mmengine')
    importlib.import_module(scope)
    init_default_scope(scope)
    return cfg
