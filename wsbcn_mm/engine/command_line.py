"""What ``tools/train.py`` and ``tools/test.py`` share, for every library."""

import argparse
import difflib
import glob
import importlib
import inspect
import os
import os.path as osp
import sys
from typing import Iterator, Tuple

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import DATASETS, RUNNERS, init_default_scope
from mmengine.runner import Runner

# default_scope of a config: what to install
LIBRARIES = {
    'mmdet': 'mmdet',
    'mmseg': 'mmsegmentation',
    'mmpretrain': 'mmpretrain',
}


class UsageError(Exception):
    """Something the user can put right: shown without a traceback."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--work-dir', help='the folder to save logs, models and metrics'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
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
    try:
        cfg = Config.fromfile(args.config)
    except ImportError as error:
        raise UsageError(f'{args.config} needs a package: {error}') from error
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('work_dirs', name)
    _import_library(cfg)
    return cfg


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
    """Raise UsageError if the files of a data set are not there."""
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for dataset in _innermost_datasets(cfg[loader]['dataset']):
            for what, path in _files(dataset):
                if not osp.exists(path):
                    raise UsageError(
                        f'no {what} at {path!r}, where {loader} of the '
                        f'config looks for its {dataset["type"]}. Put it '
                        'there, or say where it is: --cfg-options '
                        f'{loader}.dataset.data_root=...{_hint(path)}'
                    )


def check_checkpoint(path: str) -> None:
    """Raise UsageError if a local checkpoint is not there."""
    if '://' in path or osp.isfile(path):
        return
    folder = osp.dirname(path) or '.'
    found = sorted(glob.glob(osp.join(glob.escape(folder), '*.pth')))
    there = f' There: {", ".join(found)}.' if found else ''
    raise UsageError(f'no checkpoint {path!r}.{there}')


def run(main) -> None:
    """Call a tool's main function; show usage errors as one message."""
    try:
        main()
    except UsageError as error:
        sys.exit(f'error: {error}')


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


def _innermost_datasets(dataset: dict) -> Iterator[dict]:
    if 'dataset' in dataset:
        yield from _innermost_datasets(dataset['dataset'])
    elif 'datasets' in dataset:
        for part in dataset['datasets']:
            yield from _innermost_datasets(part)
    else:
        yield dataset


def _files(dataset: dict) -> Iterator[Tuple[str, str]]:
    """What a data set reads, if it is on this machine to be checked."""
    if dataset.get('backend_args') or not isinstance(dataset['type'], str):
        return
    cls = DATASETS.get(dataset['type'])
    if cls and 'download' in inspect.signature(cls.__init__).parameters:
        return
    root = dataset.get('data_root') or ''
    if '://' in root:
        return
    if root:
        yield 'data set', root
    annotations = dataset.get('ann_file') or ''
    if annotations and '://' not in annotations:
        yield 'annotation file', osp.join(root, annotations)


def _hint(path: str) -> str:
    if 'digit_scenes' not in path:
        return ''
    return (
        '\nDigit scenes take seconds to make: python '
        'tools/dataset_converters/digit_scenes.py'
    )
