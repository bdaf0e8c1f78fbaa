"""What ``tools/train.py`` and ``tools/test.py`` share, for every library."""

import argparse
import difflib
import glob
import importlib
import logging
import os
import os.path as osp
import re
import sys
from typing import Iterator, List, Optional

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner

from .config import may_exist
from .dataset_files import Missing, missing_files
from .hooks import SyncEstimatesHook
from .update_rate import rate_contradiction

# default_scope of a config: what to install
LIBRARIES = {
    'mmdet': 'mmdet',
    'mmseg': 'mmsegmentation',
    'mmpretrain': 'mmpretrain',
}


class UsageError(Exception):
    """Something the user can put right: shown without a traceback."""


class _Options(DictAction):
    """MMEngine's, with a message in place of a traceback."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(
                    f'{option_string} takes key=value, got {value!r}. What '
                    'is no option comes before it'
                )
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # brackets
            parser.error(f'{option_string}: {error}')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--work-dir', help='the folder to save logs, models and metrics'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        help='override settings of the config, as key=value. A list is '
        'key="[a,b]" or key=a,b, and may be nested: key="[(a,b),(c,d)]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """The config with the options that both tools have."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise UsageError(
            '--launcher pytorch runs below torchrun, which tells each '
            'process its rank. Use tools/dist_train.sh or '
            'tools/dist_test.sh, or leave --launcher out.'
        )
    if not osp.isfile(args.config):
        raise UsageError(
            f'no config {args.config!r}.{_similar_config(args.config)}'
        )
    cfg = config_from_file(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (KeyError, TypeError) as error:
            raise UsageError(f'--cfg-options: {error.args[0]}') from error
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('work_dirs', name)
    _import_library(cfg)
    return cfg


def config_from_file(path: str) -> Config:
    """Read a config; raise UsageError where it is wrong in a known way."""
    try:
        return Config.fromfile(path)
    except Exception as error:
        mistake = _mistake_in_config(path, error)
        if mistake is None:
            raise
        raise UsageError(mistake) from error


def build_runner(cfg: Config) -> Runner:
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        # MMEngine would ask each process for a GPU, whatever the backend.
        torch.distributed.init_process_group('gloo')
        wrapper = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        wrapper.update(cfg.get('model_wrapper_cfg') or {}, device_ids=None)
        cfg.model_wrapper_cfg = wrapper
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


def check_update_rate(runner: Runner) -> None:
    """Warn if layers have an update rate for other numbers of images."""
    batch_size = (runner.cfg.get('train_dataloader') or {}).get('batch_size')
    # A batch sampler has its own; a FlexibleRunner no model so early.
    if batch_size is None or not isinstance(runner.model, torch.nn.Module):
        return
    contradiction = rate_contradiction(
        runner.model,
        batch_size,
        runner.cfg.optim_wrapper.get('accumulative_counts', 1),
        runner.world_size,
        any(isinstance(hook, SyncEstimatesHook) for hook in runner.hooks),
    )
    if contradiction:
        print_log(contradiction, logger='current', level=logging.WARNING)


def check_scaled_lr(runner: Runner) -> None:
    """Raise UsageError if MMEngine would scale the learning rate wrongly."""
    cfg = runner.cfg
    base = cfg.auto_scale_lr.base_batch_size
    counts = cfg.optim_wrapper.get('accumulative_counts', 1)
    images = cfg.train_dataloader.get('batch_size', 0) * runner.world_size
    if counts > 1 and base > images > 0:
        raise UsageError(
            f'--auto-scale-lr compares base_batch_size={base} with the '
            f'images of one iteration, {images} here, as if there were no '
            f'accumulative_counts={counts}, so that it would multiply the '
            f'learning rate by {images / base:g}. If that is for optimizer '
            f'steps of {base} images, write auto_scale_lr=dict('
            f'base_batch_size={base / counts:g}): those of one iteration.'
        )


def check_amp() -> None:
    """Raise UsageError where MMEngine has no mixed precision."""
    if get_device() in ('cpu', 'mps'):
        raise UsageError(
            '--amp: MMEngine has mixed precision for accelerators, and sees '
            f'none here (its device is {get_device()!r}). Leave --amp out.'
        )


def check_testable(cfg: Config) -> None:
    """Raise UsageError if the config does not say what to test on."""
    needed = ('test_dataloader', 'test_cfg', 'test_evaluator')
    missing = [name for name in needed if cfg.get(name) is None]
    if missing:
        raise UsageError(
            f'the config has no {", ".join(missing)}, so there is nothing to '
            'test on. To test as it validates, add a line for each, such as '
            f'{missing[0]} = val_{missing[0].partition("_")[2]}'
        )


def check_datasets(cfg: Config, *loaders: str) -> None:
    """Raise UsageError if files of the data sets are not there."""
    missing = missing_files(cfg, *loaders)
    if not missing:
        return
    lines = [f'no {m.what} at {m.path!r} for {m.owner}' for m in missing]
    options = ' '.join(f'{m.key}=...' for m in missing)
    raise UsageError(
        '\n'.join(lines) + '\nPut them there, or say where they are: '
        f'--cfg-options {options}' + _hint(missing)
    )


def check_checkpoint(path: str) -> None:
    """Raise UsageError if a local checkpoint is not there."""
    if may_exist(path):
        return
    folder = osp.dirname(path) or '.'
    found = sorted(glob.glob(osp.join(glob.escape(folder), '*.pth')))
    there = f' There: {", ".join(found)}.' if found else ''
    raise UsageError(f'no checkpoint {path!r}.{there}')


def check_pretrained(cfg: Config) -> None:
    """Raise UsageError if what a model starts from is not there.

    MMEngine reads it before any training, even if another checkpoint comes
    after, and never for a test.
    """
    for part in _dicts(cfg.get('model')):
        path = part.get('checkpoint')
        if part.get('type') == 'Pretrained' and isinstance(path, str):
            check_checkpoint(path)


def run(main) -> None:
    """Call a tool's main function; show usage errors as one message."""
    try:
        main()
    except UsageError as error:
        sys.exit(f'error: {error}')


def _dicts(cfg) -> Iterator[dict]:
    if isinstance(cfg, dict):
        yield cfg
        cfg = list(cfg.values())
    if isinstance(cfg, (list, tuple)):
        for part in cfg:
            yield from _dicts(part)


def _similar_config(path: str) -> str:
    configs = [
        osp.relpath(found)
        for found in glob.glob('configs/**/*.py', recursive=True)
    ]
    by_name = {osp.basename(config): config for config in configs}
    close = difflib.get_close_matches(
        osp.basename(path), by_name, n=3, cutoff=0.7
    )
    if not close:
        return ''
    return ' Did you mean ' + ' or '.join(by_name[name] for name in close)


def _mistake_in_config(path: str, error: Exception) -> Optional[str]:
    """What an exception of reading a config means; None: who knows."""
    text = str(error)
    if isinstance(error, ImportError):
        return f'{path} needs a package: {error}'
    if isinstance(error, SyntaxError):
        line = (error.text or '').strip()
        if osp.isfile(error.filename or ''):
            where = error.filename
        else:  # mmengine does not tell, and it may be a base's
            with open(path, encoding='utf-8') as file:
                where = path if line in file.read() else f'a base of {path}'
        return f'{where}, line {error.lineno}: {error.msg}: {line}'
    if isinstance(error, (NameError, RuntimeError)) and (
        '_base_' in text or 'inheritance chain' in text
    ):  # mmengine takes it for its newer style, which has no _base_
        base = re.search(r'module in (\S+)\. ', text)
        return (
            f"{base[1] if base else path}: _base_ = '...' must be the first "
            'line. Imports, such as that of micro_batch_model, come after it.'
        )
    if isinstance(error, FileNotFoundError):
        return f'{path}: {error}'
    if isinstance(error, (TypeError, ValueError)) and text.startswith(
        'micro_batch_model'
    ):
        return text
    return None


def _import_library(cfg: Config) -> None:
    scope = cfg.get('default_scope', 'mmengine')
    if scope in LIBRARIES:
        try:
            importlib.import_module(scope)
        except ModuleNotFoundError as error:
            if error.name != scope:
                raise
            raise UsageError(
                f'the config is for {scope}, which is not installed: pip '
                f'install {LIBRARIES[scope]}, or bash tools/setup_env.sh '
                'for all of it.'
            ) from None
    init_default_scope(scope)


def _hint(missing: List[Missing]) -> str:
    if not any('digit_scenes' in m.path for m in missing):
        return ''
    return (
        '\nDigit scenes take seconds to make: python '
        'tools/dataset_converters/digit_scenes.py'
    )
