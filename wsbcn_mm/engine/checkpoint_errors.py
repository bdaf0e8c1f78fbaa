"""Why a checkpoint did not load, in words."""

import contextlib
import difflib
import http.client
import os.path as osp
import pickle
import re
import zipfile
from typing import Optional

import torch
from mmengine.runner import checkpoint as loaders

from .errors import CheckpointError

TRUSTED = (
    'If you trust its origin, keep its weights alone: torch.save('
    "torch.load(path, weights_only=False)['state_dict'], new_path)"
)
DAMAGED = (
    'Copy or download it again, or take another; the last whole one of a '
    'training is found by tools/train.py --resume.'
)


@contextlib.contextmanager
def explained(source: str):
    """Raise a CheckpointError in place of what loading a checkpoint raises.

    Args:
        source (str): What MMEngine loads: a path, a URL, or a name such as
            ``'torchvision://resnet50'``.
    """
    try:
        yield
    except (CheckpointError, FileNotFoundError, MemoryError):
        raise
    # Bytes that are no checkpoint make torch raise anything.
    except Exception as error:
        message = _explanation(str(source), error)
        if message is None:
            raise
        raise CheckpointError(message) from None  # which has the reason


def check_crc(path: str) -> None:
    """Raise CheckpointError if bytes of a checkpoint file have changed.

    ``torch.save`` writes a checksum of each tensor, which ``torch.load`` does
    not look at.
    """
    if not zipfile.is_zipfile(path):
        return  # of an older format, which has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) writes zeros.
            changed = any(i.CRC for i in archive.infolist()) and (
                archive.testzip()
            )
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CheckpointError(_damaged(path, str(error))) from error
    if changed:
        raise CheckpointError(_damaged(path, f'the checksum of {changed}'))


def _explanation(source: str, error: Exception) -> Optional[str]:
    """What an error means; None if its own words say more."""
    scheme, _, name = source.rpartition('://')
    if scheme and not isinstance(error, pickle.UnpicklingError):
        names = _known_names(scheme)
        if names is not None and name not in names:
            close = difflib.get_close_matches(name, names, n=3)
            return f'there is no checkpoint {source!r}.' + (
                f' Did you mean {" or ".join(close)}?' if close else ''
            )
        if isinstance(error, (OSError, http.client.HTTPException)):
            return _no_download(
                source, names[name] if names else source, error
            )
    text = str(error)
    if isinstance(error, OSError) or (
        isinstance(error, RuntimeError)
        and not re.search('PytorchStreamReader|legacy .tar|EOF|corrupt', text)
    ):
        return None
    named = re.search(r'GLOBAL (\S+)', text)
    if named:
        return (
            f'{source!r} cannot be read safely: it names {named[1]}, which is '
            f'no part of a checkpoint and could run code. {TRUSTED}'
        )
    # From a stand-in of ours, below torch's general words.
    refused = re.search(r'WeightsUnpickler error:\s*((refused|a ).+)', text)
    if refused:
        return f'{source!r} cannot be read safely: {refused[1]}. {TRUSTED}'
    return _damaged(source, text if 'PytorchStream' in text else '')


def _no_download(source: str, url: str, error: Exception) -> str:
    file = osp.basename(url.partition('?')[0])
    place = osp.join(torch.hub.get_dir(), 'checkpoints', file)
    return (
        f'{source!r} cannot be downloaded: {error}. Without network, fetch '
        f'{url} elsewhere and put it at {place}, or name a file in its place; '
        'pretrained=False of micro_batch_model, or init_cfg=None of the '
        'backbone, starts from scratch.'
    )


def _known_names(scheme: str) -> Optional[dict]:
    """The names that a scheme stands for, with their URLs."""
    read = {
        'torchvision': loaders.get_torchvision_models,
        'modelzoo': loaders.get_torchvision_models,
        'open-mmlab': loaders.get_external_models,
        'openmmlab': loaders.get_external_models,
        'mmcls': loaders.get_mmcls_models,
    }.get(scheme)
    if read is None:
        return None
    names = read()
    for old, new in loaders.get_deprecated_model_names().items():
        if new in names:
            names.setdefault(old, names[new])
    return names


def _damaged(source: str, reason: str) -> str:
    reason = reason.partition('. ')[0].rstrip('.')
    return (
        f'{source!r} cannot be read: it is damaged or truncated, or no '
        f'checkpoint{reason and f" ({reason})"}. {DAMAGED}'
    )
