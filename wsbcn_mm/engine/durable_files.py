"""Checkpoint files that a crash leaves whole."""

import contextlib
import os
import os.path as osp
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Union

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner


@register_backend('durable')
class DurableBackend(LocalBackend):
    """Local files that are whole or not there, for checkpoints.

    MMEngine writes a checkpoint in place, after it has removed those that are
    more than ``max_keep_ckpts``. A run that is killed in between, or finds the
    disk full, has lost its last checkpoint. Here a file is written beside its
    place and takes it once it is on the disk; what was to be removed from its
    folder goes after that. So there must be room for one checkpoint more.

    Example:
        >>> # In a config; tools/train.py does it by itself.
        >>> default_hooks = dict(checkpoint=dict(
        ...     type='CheckpointHook', backend_args=dict(backend='durable')))
    """

    # By folder, for all instances: CheckpointHook removes with one of its
    # own, and Runner.save_checkpoint writes with another.
    _obsolete: Dict[str, List[str]] = defaultdict(list)

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write a file, then remove those that it replaces."""
        path = osp.abspath(filepath)
        folder = osp.dirname(path)
        unfinished = f'{path}.unfinished'
        try:
            os.makedirs(folder, exist_ok=True)
            with open(unfinished, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise OSError(error.errno, error.strerror, path) from error
        for obsolete in self._obsolete.pop(folder, ()):
            if obsolete != path:
                with contextlib.suppress(FileNotFoundError):
                    super().remove(obsolete)

    def remove(self, filepath: Union[str, Path]) -> None:
        """Remove a file once another is written to its folder."""
        path = osp.abspath(filepath)
        self._obsolete[osp.dirname(path)].append(path)


def write_durably(runner: Runner) -> None:
    """Have the checkpoints of a run written by :class:`DurableBackend`.

    Where a config says how to write, or to another place than a local folder,
    it is followed.
    """
    for hook in runner.hooks:
        if (
            isinstance(hook, CheckpointHook)
            and hook.backend_args is None
            and hook.file_client_args is None
            and '://' not in str(hook.out_dir or runner.work_dir)
        ):
            hook.backend_args = dict(backend='durable')
