"""Normalizers compared on one config: their configs, cells and table."""

import copy
import difflib
import hashlib
import json
import os
import os.path as osp
import warnings
from fnmatch import fnmatch
from typing import Any, Dict, List, NamedTuple, Optional

from mmengine.config import Config

from wsbcn_mm import micro_batch_model
from wsbcn_mm.engine.command_line import UsageError
from wsbcn_mm.engine.components import (
    class_name,
    constructor_parameters,
    registered,
)
from wsbcn_mm.engine.config import GN_WS_CHECKPOINTS

from .cells import Store, cell_name
from .results import Score, difference, score
from .schedules import images_of_schedule, set_images, shorten

AS_IS = 'as-is'
FROZEN = 'bn-frozen'
NORMS = {
    'bn': dict(type='BN'),
    'sync-bn': dict(type='SyncBN'),
    'in': dict(type='IN', affine=True),
    'gn': dict(type='GN'),
    'bcn': dict(type='BCN'),
    'sync-bcn': dict(type='SyncBCN'),
    'bcn-large': dict(type='BCN', estimate=False),
    'bgn': dict(type='BGN'),
    'mabn': dict(type='MABN'),
}
CONVS = {
    '': 'Conv2d',
    'ws': 'ConvWS',
    'wn': 'ConvWN',
    'cwn': 'ConvCWN',
    'cenconv': 'CenConv',
}
# Settings of a method that are arguments of micro_batch_model. Others are
# settings of the config.
CONVERSION = ('norm_cfg', 'conv_cfg', 'pretrained', 'convert')
# Metrics of the libraries: what readers call them, and the unit that makes
# them points.
METRICS = {
    'bbox_mAP': ('box AP', 100),
    'segm_mAP': ('mask AP', 100),
    'bbox_AP': ('box AP', 100),
    'segm_AP': ('mask AP', 100),
    'mAP': ('mAP', 100),
    'PQ': ('PQ', 1),
    'mIoU': ('mIoU', 1),
    'top1': ('top-1 accuracy', 1),
}
PUBLISHED = osp.join(osp.dirname(__file__), osp.pardir, 'published.json')


class Method(NamedTuple):
    """A normalizer, and what else of the config goes with it.

    Attributes:
        name (str): What the table calls it.
        like (str): A name that :func:`check_method` knows.
        settings (dict): Settings that differ from it, as ``key: value`` with
            dots: arguments of ``micro_batch_model`` or keys of the config.
    """

    name: str
    like: str
    settings: dict = {}


def check_method(name: str) -> str:
    """Return the name of a method as this module spells it.

    Raises:
        UsageError: If there is no such method.
    """
    spelled = name.lower().replace('+', '-').replace('_', '-')
    norm, conv = _parts(spelled)
    if spelled in (AS_IS, FROZEN) or norm in NORMS:
        return spelled
    known = [AS_IS, FROZEN, *NORMS]
    known += [f'{norm}-{conv}' for norm in NORMS for conv in CONVS if conv]
    close = difflib.get_close_matches(spelled, known, n=3)
    hint = f' Did you mean {" or ".join(close)}?' if close else ''
    raise UsageError(
        f'there is no method {name!r}.{hint} There are {AS_IS}, {FROZEN}, '
        f'{", ".join(NORMS)}, the latter also with '
        f'{", ".join(f"-{conv}" for conv in CONVS if conv)} for the '
        'convolutions, and your own by --method NAME key=value.'
    )


def _parts(name: str) -> List[str]:
    """``['bcn', 'ws']`` for 'bcn-ws', ``['sync-bcn', '']`` for 'sync-bcn'."""
    norm, _, conv = name.rpartition('-')
    return [norm, conv] if norm and conv in CONVS else [name, '']


class Comparison:
    """The cells of a comparison, in the form of a :class:`study.cells.Grid`.

    Args:
        cfg (Config): The config that users have, data included.
        name (str): Its file name.
        methods (list[Method]): What is compared.
        seeds (int): Number of trainings of each.
        lrs (list[float]): Learning rates, each a row of the table. None of
            them: the config's.
        images_per_gpu (int): Images in one forward pass. Default: 1
        images_per_update (int | None): Images in one optimizer step. Default:
            None, as many as the config is written for.
        gpus (int): GPUs of one training. Default: 1
        steps (int | None): Optimizer steps. Default: None, the config's.
        num_groups (int): Of GN, BCN and BGN. Default: 32
    """

    def __init__(
        self,
        cfg: Config,
        name: str,
        methods: List[Method],
        seeds: int = 3,
        lrs: Optional[List[float]] = None,
        images_per_gpu: int = 1,
        images_per_update: Optional[int] = None,
        gpus: int = 1,
        steps: Optional[int] = None,
        num_groups: int = 32,
    ):
        self.name = name
        self.seeds = list(range(seeds))
        self.images_per_gpu = images_per_gpu
        self.gpus = gpus
        self.num_groups = num_groups
        self.base = base = copy.deepcopy(cfg)
        images = _schedule_images(cfg, name, images_per_update)
        self.schedule_images = images
        self.images_per_update = images_per_update or images
        set_images(base, images_per_gpu, self.images_per_update, gpus, images)
        if steps is not None:
            shorten(base, steps)
        _make_testable(base)
        # What every cell has: it goes on where it was interrupted.
        _add_import(base)
        _add_hook(base, 'ExactResumeHook')
        checkpoint = base.setdefault('default_hooks', {}).get('checkpoint')
        checkpoint = checkpoint or dict(type='CheckpointHook')
        # Two, since MMEngine deletes the old one before it writes the new.
        base.default_hooks.checkpoint = dict(checkpoint, max_keep_ckpts=2)
        self.configs, self.errors = {}, {}
        for method in methods:
            try:
                self.configs[method.name] = self._config(method)
            except UsageError:
                raise
            except Exception as error:  # a row of the table
                self.errors[method.name] = f'{type(error).__name__}: {error}'
        rates = lrs or [None]
        if lrs and 'lr' not in (base.optim_wrapper.get('optimizer') or {}):
            raise UsageError('--lr: the config has no optim_wrapper.optimizer')
        for method in methods if lrs else ():
            if 'optim_wrapper.optimizer.lr' in method.settings:
                raise UsageError(
                    f'--lr is for all methods, and {method.name} has a '
                    'learning rate of its own.'
                )
        self.cells = [
            _settings(method.name, self.configs.get(method.name), lr)
            for method in methods
            for lr in rates
        ]

    def tuning_cells(self) -> List[dict]:
        """Return none: the user chooses the learning rates."""
        return []

    def final_cells(self, _: Optional[dict] = None) -> List[dict]:
        """Return the trainings, seeds outermost, so that rows grow alike."""
        return [
            {**cell, 'seed': seed}
            for seed in self.seeds
            for cell in self.cells
            if cell['method'] in self.configs
        ]

    def config(self, cell: dict) -> Config:
        """Return the complete config of a training."""
        cfg = copy.deepcopy(self.configs[cell['method']])
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=cell['seed'])
        if cell.get('lr') is not None:
            cfg.optim_wrapper.optimizer.lr = cell['lr']
        return cfg

    def _config(self, method: Method) -> Config:
        cfg = copy.deepcopy(self.base)
        settings = method.settings
        options = {
            key: value
            for key, value in settings.items()
            if key.partition('.')[0] not in CONVERSION
        }
        own = {k: v for k, v in settings.items() if k not in options}
        for key in options:
            top = key.partition('.')[0]
            close = difflib.get_close_matches(top, [*cfg.keys(), *CONVERSION])
            if top not in cfg and close:
                raise UsageError(
                    f'--method {method.name}: there is no {top}. Did you '
                    f'mean {close[0]}?'
                )
        if method.like in (AS_IS, FROZEN):
            if own:
                raise ValueError(
                    f'{", ".join(own)} can change no method like '
                    f'{method.like}, whose layers are those of the config'
                )
            if method.like == FROZEN:
                _freeze(cfg.model, cfg.default_scope)
        else:
            self._convert(cfg, method.like, own)
        try:
            cfg.merge_from_dict(options)
        except (KeyError, TypeError) as error:
            raise UsageError(f'--method {method.name}: {error}') from error
        return cfg

    def _convert(self, cfg: Config, like: str, own: dict) -> None:
        norm, conv = _parts(like)
        shared = norm.startswith('sync-')
        images = self.images_per_gpu * (self.gpus if shared else 1)
        conversion = Config(
            dict(
                norm_cfg=dict(NORMS[norm]),
                conv_cfg=dict(type=CONVS[conv]),
                pretrained=None,
            )
        )
        kind = registered(NORMS[norm]['type'])
        if 'num_groups' in constructor_parameters(kind):
            conversion.norm_cfg.num_groups = self.num_groups
        if 'norm_cfg.type' in own:  # arguments of another layer mean nothing
            conversion.norm_cfg = {}
        conversion.merge_from_dict(own)
        with warnings.catch_warnings():
            # What a backbone starts from is a column of the table.
            warnings.filterwarnings('ignore', '.* starts from ')
            cfg.model = micro_batch_model(
                _before_conversion(cfg.model, conversion.conv_cfg['type']),
                images_per_gpu=images,
                images_per_update=self.images_per_update,
                **conversion.to_dict(),
            )
        _add_hook(cfg, 'CalibrateEstimatesHook')
        if self.gpus > 1 and not shared:
            _add_hook(cfg, 'SyncEstimatesHook')


class CellStore(Store):
    """Records of cells, each in a folder with its config and log."""

    def cell_folder(self, cell: dict) -> str:
        return osp.join(self.folder, cell_name(cell))

    def path(self, settings: dict) -> str:
        return osp.join(self.cell_folder(settings), 'record.json')

    def write(self, record: dict) -> None:
        os.makedirs(self.cell_folder(record['settings']), exist_ok=True)
        super().write(record)


def _settings(method: str, cfg: Optional[Config], lr: Optional[float]) -> dict:
    """What names a cell, but for its seed: its whole config, as a digest."""
    text = json.dumps(cfg and cfg.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    settings = dict(method=method, config=digest[:16])
    return settings if lr is None else dict(settings, lr=lr)


def _schedule_images(cfg: Config, name: str, given: Optional[int]) -> int:
    images = images_of_schedule(cfg, name) or given
    if not images:
        raise UsageError(
            f'{name} does not say for how many images per optimizer step its '
            'schedule is: neither a part such as 4xb2 of its name does, nor '
            'auto_scale_lr.base_batch_size. Give --images-per-update.'
        )
    return images


def _make_testable(cfg: Config) -> None:
    """Test on the validation data where the config has no other."""
    for part in ('dataloader', 'evaluator', 'cfg'):
        if cfg.get(f'test_{part}') is None:
            if cfg.get(f'val_{part}') is None:
                raise UsageError(
                    f'the config has neither test_{part} nor val_{part}: '
                    'there is nothing to compare by.'
                )
            test = copy.deepcopy(cfg[f'val_{part}'])
            cfg[f'test_{part}'] = (
                dict(type='TestLoop') if part == 'cfg' else test
            )


def _add_import(cfg: Config) -> None:
    imports = cfg.get('custom_imports') or dict(imports=[])
    names = imports['imports']
    names = [names] if isinstance(names, str) else list(names)
    if 'wsbcn_mm' not in names:
        names.append('wsbcn_mm')
    cfg.custom_imports = dict(imports, imports=names)


def _add_hook(cfg: Config, kind: str) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    if all(class_name(hook['type']) != kind for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=kind)]


def _freeze(model: dict, scope: str) -> None:
    """Keep the statistics and running averages of a pretrained BN."""
    backbone = model.get('backbone') or {}
    component = registered(backbone.get('type'), scope)
    parameters = constructor_parameters(component)
    norm = backbone.get('norm_cfg', parameters.get('norm_cfg'))
    kind = class_name(backbone.get('type'))
    if 'norm_eval' not in parameters:
        raise ValueError(f'{FROZEN}: {kind} has no norm_eval to set')
    if class_name((norm or {}).get('type')) not in ('BN', 'SyncBN', 'BN2d'):
        raise ValueError(
            f'{FROZEN}: {kind} has norm_cfg={norm!r}, no BN to freeze; '
            'compare on the config with BN'
        )
    if checkpoint_of(model) is None:
        raise ValueError(
            f'{FROZEN}: {kind} starts from no checkpoint, so that there are '
            'no statistics to keep'
        )
    backbone['norm_eval'] = True


def _before_conversion(model: dict, conv: str) -> dict:
    """Return a model that has plain convolutions if ``model`` does not.

    What a backbone starts from is to depend on the method, and not on which
    of two configs of the same network the comparison is made.

    Args:
        model (dict): The model of the config.
        conv (str): The convolution that the method has.
    """
    originals = {new: old for old, new in GN_WS_CHECKPOINTS.items()}
    checkpoint = checkpoint_of(model)
    convs = {
        class_name(value)
        for key, value in flat(model).items()
        if key.endswith('conv_cfg.type')
    }
    others = convs & {*CONVS.values()} - {'Conv2d', conv}
    if checkpoint not in originals and not others:
        return model
    return micro_batch_model(
        model,
        dict(type='BN'),
        dict(type='Conv2d'),
        pretrained=originals.get(checkpoint, False),
    )


def checkpoint_of(model: dict) -> Optional[str]:
    """Return what the backbone of a model config starts from, if anything."""
    backbone = model.get('backbone') or {}
    inits = backbone.get('init_cfg') or []
    for init in inits if isinstance(inits, (list, tuple)) else [inits]:
        if init.get('checkpoint'):
            return init['checkpoint']
    return model.get('pretrained') or backbone.get('pretrained')


def flat(cfg: Any, key: str = '') -> Dict[str, Any]:
    """Return the leaves of a config by their keys with dots."""
    parts = {}
    if isinstance(cfg, dict):
        parts = cfg
    elif isinstance(cfg, (list, tuple)) and any(
        isinstance(part, dict) for part in cfg
    ):
        parts = dict(enumerate(cfg))
    if not parts:
        return {key: cfg}
    leaves = {}
    for name, part in parts.items():
        leaves.update(flat(part, f'{key}.{name}' if key else str(name)))
    return leaves


def changed(before: dict, after: dict) -> List[str]:
    """Return a line for each setting that differs.

    Layers that change alike share one.
    """
    old, new = flat(before), flat(after)
    owners = {}
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, flat) == new.get(key, flat):
            continue
        owner, setting = '', key
        parts = key.rsplit('.', 2)
        if parts[0].startswith('model.') and parts[1].endswith('_cfg'):
            owner, setting = parts[0][len('model.') :], '.'.join(parts[1:])
        change = f'{setting}: {_shown(old, key)} -> {_shown(new, key)}'
        owners.setdefault(change, []).append(owner)
    return [
        change + (f' ({", ".join(names)})' if names[0] else '')
        for change, names in owners.items()
    ]


def _shown(leaves: dict, key: str) -> str:
    return repr(leaves[key]) if key in leaves else '-'


def metrics_of(runs: List[dict], wanted: List[str]) -> List[str]:
    """Return the metrics that a table shows.

    Args:
        runs (list[dict]): Records of cells.
        wanted (list[str]): Names to show, or none for the usual ones.

    Raises:
        UsageError: If no run has a wanted one.
    """
    found = dict.fromkeys(
        name
        for run in runs
        for name in run.get('result', {})
        if name not in ('seconds_per_iter', 'gigabytes')
    )
    for name in wanted:
        if found and name not in found:
            raise UsageError(
                f'--metrics: no training has {name!r}; there are '
                f'{", ".join(found)}.'
            )
    if wanted:
        return wanted
    return [name for name in METRICS if name in found] or list(found)[:3]


def metric_name(metric: str) -> str:
    return METRICS.get(metric, (metric, 1))[0]


def in_points(runs: List[dict]) -> List[dict]:
    """Return runs whose metrics that are shares of 1 are per cent."""
    return [
        dict(
            run,
            result={
                name: value * METRICS.get(name, ('', 1))[1]
                if value is not None
                else None
                for name, value in run['result'].items()
            },
        )
        if 'result' in run
        else run
        for run in runs
    ]


def table(
    comparison: Comparison, runs: List[dict], metrics: List[str], baseline: str
) -> str:
    """Return the table of a comparison, in Markdown.

    Args:
        comparison (Comparison): Its rows, in order.
        runs (list[dict]): Records of cells, in points.
        metrics (list[str]): A column each, with one of differences.
        baseline (str): The method that differences are to.
    """
    by_row = {}
    for run in runs:
        settings = run['settings']
        row = settings['method'], settings.get('lr')
        by_row.setdefault(row, []).append(run)
    head = ['method']
    for metric in metrics:
        head += [metric_name(metric), f'minus {baseline}']
    head += ['runs', 's/iter', 'GiB', 'starts from']
    lines = []
    for cell in comparison.cells:
        method, lr = cell['method'], cell.get('lr')
        mine = by_row.get((method, lr), [])
        rival = by_row.get((baseline, lr), [])
        line = [method if lr is None else f'{method}, lr {lr:g}']
        for metric in metrics:
            summary = score(mine, metric)
            failed = summary.error or comparison.errors.get(method)
            line.append(_mean(summary, failed, len(mine)))
            other = score(rival, metric).values if method != baseline else []
            line.append(_difference(summary.values, other))
        done = sum('result' in run for run in mine)
        line.append(f'{done} of {len(comparison.seeds)}')
        line.append(_number(score(mine, 'seconds_per_iter').mean, '.3g'))
        line.append(_number(score(mine, 'gigabytes').mean, '.1f'))
        cfg = comparison.configs.get(method)
        line.append('' if cfg is None else _start(cfg))
        lines.append(line)
    shown = [
        i for i in range(len(head)) if i == 0 or any(line[i] for line in lines)
    ]
    rows = [head, ['---', *['---:'] * (len(head) - 2), '---'], *lines]
    text = [
        '| ' + ' | '.join(row[i] for i in shown) + ' |' for row in rows
    ] + ['']
    errors = dict.fromkeys(comparison.errors.items())
    for run in runs:
        if 'error' in run:
            settings = run['settings']
            key = settings['method'], run['error']
            errors.setdefault(key, osp.join(cell_name(settings), 'log.txt'))
    for (method, message), log in errors.items():
        text.append(f'- {method}: {message}' + (f' ({log})' if log else ''))
    return '\n'.join(text).rstrip() + '\n'


def _mean(summary: Score, failed: Optional[str], runs: int) -> str:
    if summary.mean is None:
        return 'fails' if failed or runs else ''
    half = '' if summary.half is None else f' ± {summary.half:.2f}'
    count = len(summary.values)
    some = f' ({count} of {runs} runs)' if count < runs else ''
    return f'{summary.mean:.2f}{half}{some}'


def _difference(values: List[float], others: List[float]) -> str:
    if min(len(values), len(others)) < 2:
        return ''
    mean, half = difference(values, others)
    text = f'{mean:+.2f} ± {half:.2f}'
    return f'**{text}**' if abs(mean) > half else text


def _number(value: Optional[float], form: str) -> str:
    return '' if value is None else format(value, form)


def _start(cfg: Config) -> str:
    if cfg.get('load_from'):
        return osp.basename(cfg.load_from)
    return (checkpoint_of(cfg.model) or 'scratch').rpartition('://')[2]


def published(name: str) -> str:
    """Return what others published of a config of the zoo, as Markdown."""
    with open(PUBLISHED) as f:
        groups = json.load(f)
    stem = osp.splitext(osp.basename(name))[0]
    rows = [
        row
        for group in groups
        for row in group['rows']
        if any(fnmatch(stem, pattern) for pattern in group['configs'])
    ]
    if not rows:
        return ''
    metrics = [m for m in METRICS if any(m in row for row in rows)]
    head = ['published', *map(metric_name, metrics), 'source']
    lines = [head, ['---', *['---:'] * len(metrics), '---']]
    for row in rows:
        numbers = [_number(row.get(m), '.1f') for m in metrics]
        lines.append([row['method'], *numbers, row['source']])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'
