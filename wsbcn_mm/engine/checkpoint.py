"""Read and write checkpoint files, for the command-line tools."""

import glob
import hashlib
import io
import logging
import os.path as osp
from collections import OrderedDict
from typing import Any, Dict, Optional

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from .checkpoint_errors import check_crc, explained
from .compat import mmengine_checkpoints
from .durable_files import DurableBackend
from .errors import CheckpointError, UsageError
from .mistakes import config_from_file, import_library


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint file without running code that is in it.

    Returns:
        dict: With ``state_dict`` and ``meta`` at least.

    Raises:
        CheckpointError: If it cannot be read, or holds no weights.
    """
    if not osp.isfile(path):
        raise CheckpointError(f'no checkpoint {path!r}')
    check_crc(path)
    with mmengine_checkpoints(), explained(path):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
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
        raise CheckpointError(f'{path!r} holds no weights.')
    if state is checkpoint:
        checkpoint = {}
    checkpoint['state_dict'] = strip(state, 'module.')
    checkpoint.setdefault('meta', {})
    return checkpoint


def read_state_dict(path: str) -> Dict[str, Tensor]:
    """The weights of a checkpoint file: see :func:`read_checkpoint`."""
    return read_checkpoint(path)['state_dict']


def newest_checkpoint(work_dir: str) -> Optional[str]:
    """Return the newest checkpoint of a work directory that can be read.

    MMEngine resumes from what the file ``last_checkpoint`` names, whether or
    not it is there and whole. Here the others of the folder are tried too,
    the newest first.

    Returns:
        str | None: Its path, or None if there is no checkpoint.

    Raises:
        CheckpointError: If there are some, and none can be read.
    """
    named = osp.join(work_dir, 'last_checkpoint')
    last = ''
    if osp.isfile(named):
        with open(named) as file:
            last = file.read().strip()
    if '://' in last or osp.isdir(last):
        return last  # of a storage or a strategy that MMEngine knows
    folders = {osp.abspath(work_dir)}
    if last:
        folders.add(osp.dirname(osp.abspath(last)))
    candidates = [
        path
        for folder in folders
        for path in glob.glob(osp.join(glob.escape(folder), '*.pth'))
        if not osp.basename(path).startswith('best_')  # has no optimizer
    ]
    candidates.sort(key=osp.getmtime, reverse=True)
    if last:
        candidates.insert(0, last)
    problems = []
    for path in dict.fromkeys(map(osp.abspath, candidates)):
        try:
            check_resumable(read_checkpoint(path), path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print_log(
                f'Not resumed from the last checkpoint: {problem}',
                'current',
                logging.WARNING,
            )
        return path
    if problems:
        raise CheckpointError(
            f'--resume finds no checkpoint in {work_dir!r} to go on from:\n'
            + '\n'.join(problems)
        )
    return None


def check_resumable(checkpoint: Dict[str, Any], path: str) -> None:
    """Raise CheckpointError if a training cannot go on from a checkpoint."""
    meta = checkpoint.get('meta') or {}
    lacks = [key for key in ('epoch', 'iter') if key not in meta]
    lacks += [key for key in ('message_hub',) if key not in checkpoint]
    if lacks:
        raise CheckpointError(
            f'{path!r} has no {", ".join(lacks)}: it is not of a training, so '
            'there is nothing to resume. To start from its weights, '
            f'leave --resume out and add --cfg-options load_from={path}'
        )


def share_of_weights(
    module: nn.Module, state_dict: Dict[str, Tensor]
) -> float:
    """Which share of a network's weights a state dict has, by name and shape.

    Looks at what has two dimensions and more: convolutions and linear layers,
    which have one name whatever the normalization.
    """
    own = {k: v for k, v in module.state_dict().items() if v.dim() > 1}
    found = [
        key
        for key, value in own.items()
        if getattr(state_dict.get(key), 'shape', None) == value.shape
    ]
    return len(found) / len(own) if own else 1.0


def check_same_network(
    module: nn.Module, state: Dict[str, Tensor], what: str, least: float = 0
) -> None:
    """Raise CheckpointError unless a share of a network is in a state dict.

    Args:
        module (nn.Module): The network.
        state (dict): The weights.
        what (str): What the message calls them.
        least (float): The share of the network's weights must be larger.
    """
    share = share_of_weights(module, state)
    if share <= least:
        raise CheckpointError(
            f'{what} is of another network: it has {share:.0%} of the weights '
            f'of {type(module).__name__}, by name and shape. The network has '
            f'{_some(module.state_dict())}; the checkpoint {_some(state)}.'
        )


def _some(state: dict) -> str:
    weights = [(k, v) for k, v in state.items() if getattr(v, 'ndim', 0) > 1]
    return (
        ', '.join(f'{key} {tuple(value.shape)}' for key, value in weights[:2])
        or 'none'
    )


def load_all_weights(
    module: nn.Module, state: Dict[str, Tensor], what: str, strict: bool
) -> Any:
    """Do ``module.load_state_dict``; say in a few lines what does not fit."""
    check_same_network(module, state, what)
    try:
        return module.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        if not lines[0].startswith('Error(s) in loading'):
            raise
        more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
        raise CheckpointError(
            f'{what} does not fit the network of the config: '
            + ' '.join(line[:300] for line in lines[1:3])
            + more
        ) from error


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
    meta = {
        key: value
        for key, value in checkpoint.get('meta', {}).items()
        if key in ('cfg', 'dataset_meta', 'epoch', 'iter', 'seed')
    }
    content = dict(state_dict=checkpoint['state_dict'], meta=meta)
    with io.BytesIO() as file:
        torch.save(content, file)
        data = file.getvalue()
    path = f'{stem}-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    DurableBackend().put(data, path)
    return path


def read_config(path: str) -> Config:
    """Read a config and import the library that it is for."""
    if not osp.isfile(path):
        raise UsageError(f'no config {path!r}')
    cfg = config_from_file(path)
    if 'model' not in cfg:
        raise UsageError(f'{path!r} has no model.')
    import_library(cfg)
    return cfg
