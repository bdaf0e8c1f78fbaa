"""What ``tools/train.py`` and ``tools/test.py`` share, for every library."""

import argparse
import contextlib
import difflib
import glob
import inspect
import logging
import os
import os.path as osp
import sys
import tempfile
from typing import Iterator, List

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import Runner
from torch import nn

from .checkpoint import (
    check_resumable,
    check_same_network,
    read_state_dict,
    select,
    strip,
)
from .checkpoint_errors import check_crc
from .config import may_exist
from .dataset_files import (
    NO_IMAGES,
    Missing,
    annotations_explained,
    missing_files,
    problems_of_dataset,
)
from .durable_files import write_durably
from .errors import CheckpointError, UsageError
from .hooks import SkipNonFiniteHook, SyncEstimatesHook
from .mistakes import (
    about_a_file,
    config_from_file,
    did_you_mean,
    import_library,
)
from .update_rate import rate_contradiction


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
    _warn_of_unread_keys(cfg)
    import_library(cfg)
    return cfg


def build_runner(cfg: Config, needs_all_weights: bool = False) -> Runner:
    """Build the runner of a config, guarded against what goes wrong in runs.

    Checkpoints are written whole, those of other networks are refused, and
    steps by gradients that are not finite are skipped.

    Args:
        cfg (Config): A whole config.
        needs_all_weights (bool): Whether what is loaded must be this network,
            and not merely a part of it. Default: False
    """
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
    if 'runner_type' in cfg:  # of a strategy with checkpoints of its own
        return RUNNERS.build(cfg)
    runner = Runner.from_cfg(cfg)
    write_durably(runner)
    runner.register_hook(_CheckCheckpoint(needs_all_weights), 'VERY_HIGH')
    if not any(isinstance(hook, SkipNonFiniteHook) for hook in runner.hooks):
        runner.register_hook(SkipNonFiniteHook())
    return runner


def check_update_rate(runner: Runner) -> None:
    """Warn if layers have an update rate for other numbers of images."""
    batch_size = (runner.cfg.get('train_dataloader') or {}).get('batch_size')
    # A batch sampler has its own; a FlexibleRunner no model so early. What
    # is no number, the loader refuses.
    if not (
        isinstance(batch_size, int)
        and isinstance(runner.model, torch.nn.Module)
    ):
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


def check_work_dir(path: str) -> None:
    """Raise UsageError if nothing can be written to a work directory."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(2**20))  # for logs, at least
    except OSError as error:
        raise UsageError(
            f'nothing can be written to the work directory {path!r}: '
            f'{error.strerror}. Name another with --work-dir.'
        ) from error


def check_training_set(runner: Runner) -> None:
    """Raise UsageError if there is nothing to train on; warn of lost classes.

    Builds the data set, which the runner then takes as it is.
    """
    loader = getattr(runner, '_train_dataloader', None)
    if not isinstance(runner, Runner) or not isinstance(loader, dict):
        return
    cfg = loader.get('dataset')
    if not isinstance(cfg, dict):
        return
    with annotations_explained(cfg):
        dataset = DATASETS.build(cfg)
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        if len(dataset) == 0:
            raise ValueError(NO_IMAGES)
    runner._train_dataloader = ConfigDict(loader, dataset=dataset)
    for problem in problems_of_dataset(dataset):
        print_log(problem, logger='current', level=logging.WARNING)


def check_checkpoint(path: str) -> None:
    """Raise UsageError if a local checkpoint is not there, or has changed."""
    if may_exist(path):
        if osp.isfile(osp.expanduser(path)):
            check_crc(osp.expanduser(path))
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


def check_started(cfg: Config, model: nn.Module) -> None:
    """Raise UsageError if a part of a model starts from another's weights.

    MMEngine warns of what does not match and goes on, with random weights.
    """
    for name, module in model.named_modules():
        for part in _dicts(getattr(module, 'init_cfg', None)):
            path = part.get('checkpoint')
            if part.get('type') != 'Pretrained' or not isinstance(path, str):
                continue
            if osp.isfile(osp.expanduser(path)):
                state = read_state_dict(osp.expanduser(path))
                prefix = part.get('prefix')
                if prefix:
                    state = select(state, prefix.rstrip('.') + '.')
                check_same_network(
                    module, state, f'{path!r}, init_cfg of {name}'
                )


class _CheckCheckpoint(Hook):
    """Refuses to go on from a checkpoint of another network."""

    def __init__(self, needs_all_weights: bool):
        self.needs_all_weights = needs_all_weights

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        path = repr(str(runner._load_from))
        if not isinstance(checkpoint, dict):
            raise CheckpointError(
                f'{path} holds a {type(checkpoint).__name__}; expected a '
                'checkpoint, a dict of tensors.'
            )
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        state = checkpoint.get('state_dict', checkpoint)
        least = 0.5 if self.needs_all_weights or runner._resume else 0
        check_same_network(model, strip(state, 'module.'), path, least)
        if runner._resume:
            check_resumable(checkpoint, path.strip("'"))
            _check_optimizer(runner, checkpoint, path)


def _check_optimizer(runner, checkpoint: dict, path: str) -> None:
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    groups = checkpoint.get('optimizer', {}).get('param_groups')
    if not isinstance(optimizer, torch.optim.Optimizer) or not groups:
        return
    # Other versions of torch add settings, or lack some, but not both.
    saved = groups[0].keys() - {'params', 'initial_lr'}
    own = optimizer.defaults.keys()
    sizes, own_sizes = (
        [len(group['params']) for group in some]
        for some in (groups, optimizer.param_groups)
    )
    if sizes != own_sizes or (saved - own and own - saved):
        raise CheckpointError(
            f'{path} has the state of another optimizer, or of one for other '
            'parameters, than the config. Resume with the config of that '
            'training. To start from its weights alone, leave --resume out '
            f'and add --cfg-options load_from={path}'
        )


def run(main) -> None:
    """Call a tool's main function; show usage errors as one message."""
    try:
        with _without_code():
            main()
    except UsageError as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        message = about_a_file(error)
        if message is None:
            raise
        sys.exit(f'error: {message}')


@contextlib.contextmanager
def _without_code():
    """Let nothing that is loaded run code, downloads included.

    Torch asks MMEngine's loaders for that since 2.6 only, and its own loader
    of URLs never.
    """
    name = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    if name in os.environ or 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' in os.environ:
        yield
        return
    os.environ[name] = '1'
    try:
        yield
    finally:
        del os.environ[name]


def _warn_of_unread_keys(cfg: Config) -> None:
    """Warn of what MMEngine would pass over because it is misspelled."""
    read = set(inspect.signature(Runner.__init__).parameters) - {'self'}
    for key in cfg:
        close = difflib.get_close_matches(key, read, 1, cutoff=0.85)
        if close and key not in read:
            print_log(
                f'Nothing reads {key!r} in the config.'
                + did_you_mean(key, close),
                logger='current',
                level=logging.WARNING,
            )


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


def _hint(missing: List[Missing]) -> str:
    if not any('digit_scenes' in m.path for m in missing):
        return ''
    return (
        '\nDigit scenes take seconds to make: python '
        'tools/dataset_converters/digit_scenes.py'
    )
