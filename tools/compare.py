"""Compare normalizers on a config of one's own, with data of one's own.

    python tools/compare.py CONFIG --methods bn-frozen gn-ws bcn-ws --seeds 3

trains and tests each method with each seed, and makes a table and a plot.
The same command goes on where it was interrupted. See docs/compare.md.
"""

import argparse
import fcntl
import os
import os.path as osp
import sys
import tempfile
from typing import List

from mmengine.config import Config, DictAction
from rich.console import Console

sys.path.insert(0, osp.join(osp.dirname(osp.abspath(__file__)), 'study'))

from study import plots, results  # noqa: E402
from study.coco_data import use_coco  # noqa: E402
from study.comparison import (  # noqa: E402
    CellStore,
    Comparison,
    Method,
    changed,
    check_method,
    in_points,
    metric_name,
    metrics_of,
    published,
    table,
)
from study.trainings import gpu_slots, run_trainings  # noqa: E402

import wsbcn_mm  # noqa: F401, E402  registers the layers
from wsbcn_mm.engine.command_line import (  # noqa: E402
    UsageError,
    _Options,
    check_datasets,
    check_pretrained,
    load_config,
    run,
)


def parse_args(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'config',
        help='a config file of MMDetection, MMSegmentation or MMPretrain, or '
        'one of the zoo, as mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py',
    )
    parser.add_argument(
        '--methods',
        nargs='+',
        default=[],
        help='as-is, bn-frozen, bn, gn, bcn, bcn-large, sync-bcn, bgn, mabn, '
        'in, ..., each but the first two also with -ws, -wn, -cwn or -cenconv',
    )
    parser.add_argument(
        '--method',
        nargs='+',
        action='append',
        default=[],
        metavar='NAME key=value',
        help='a method of your own: like=METHOD to begin with, norm_cfg.KEY, '
        'conv_cfg.KEY, pretrained, and any setting of the config',
    )
    parser.add_argument(
        '--baseline',
        help='the method that differences are to (default: the first)',
    )
    parser.add_argument('--seeds', type=_count, default=3)
    parser.add_argument(
        '--lr', nargs='+', type=float, help='learning rates to try with each'
    )
    parser.add_argument(
        '--iters',
        type=_count,
        help="optimizer steps of a training (default: the config's schedule)",
    )
    parser.add_argument(
        '--images-per-gpu',
        type=_count,
        default=1,
        help='images in one forward pass (default: %(default)s)',
    )
    parser.add_argument(
        '--images-per-update',
        type=_count,
        help='images in one optimizer step (default: as many as the config '
        'is written for)',
    )
    parser.add_argument(
        '--num-groups',
        type=_count,
        default=32,
        help='groups of GN, BCN and BGN (default: %(default)s)',
    )
    for split in ('train', 'val'):
        parser.add_argument(
            f'--{split}',
            nargs=2,
            metavar=('JSON', 'IMAGES'),
            help='an annotation file in the format of COCO and the folder of '
            'its images, in place of the data of a config of MMDetection',
        )
    parser.add_argument(
        '--metrics', nargs='+', default=[], help='what the table shows'
    )
    parser.add_argument(
        '--gpus', help='which to use, as 0,1,2 (default: all there are)'
    )
    parser.add_argument(
        '--gpus-per-training',
        type=_count,
        default=1,
        help='processes of one training (default: %(default)s)',
    )
    parser.add_argument(
        '--workers',
        type=_count,
        help='trainings at once (default: one on each GPU; one on a CPU)',
    )
    parser.add_argument(
        '--retry', action='store_true', help='run failed trainings again'
    )
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='list the trainings, and what differs between the configs',
    )
    parser.add_argument(
        '--work-dir', help='default: work_dirs/compare/<name of the config>'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        help='settings of the config for all methods, as key=value',
    )
    args = parser.parse_args(args)
    if bool(args.train) != bool(args.val):
        parser.error('--train and --val go together')
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f'expected a positive integer, got {text!r}'
        )
    return int(text)


def read_methods(args) -> List[Method]:
    methods = [Method(name, name) for name in map(check_method, args.methods)]
    for name, *options in args.method:
        settings = {}
        for option in options:
            key, equals, value = option.partition('=')
            if not equals:
                raise UsageError(
                    f'--method {name}: expected key=value, got {option!r}.'
                )
            try:
                settings[key] = DictAction._parse_iterable(value)
            except AssertionError as error:  # brackets
                raise UsageError(f'--method {name}: {error}') from error
        if 'like' not in settings and 'norm_cfg.type' not in settings:
            raise UsageError(
                f'--method {name}: give like=METHOD or norm_cfg.type=LAYER.'
            )
        like = check_method(settings.pop('like', 'bn'))
        methods.append(Method(name, like, settings))
    names = [method.name for method in methods]
    if len(methods) < 1:
        raise UsageError('give --methods, such as: gn-ws bcn-ws bn-frozen.')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f'{", ".join(twice)}: given more than once.')
    return methods


def read_config(args) -> Config:
    options = argparse.Namespace(
        config=args.config,
        cfg_options=args.cfg_options,
        work_dir=None,
        launcher='none',
        local_rank=0,
    )
    if '::' not in args.config:
        cfg = load_config(options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.config = osp.join(folder, 'config.py')
            with open(options.config, 'w') as f:
                f.write(f'_base_ = {args.config!r}\n')
            cfg = load_config(options)
    for key in ('work_dir', 'launcher'):  # those of each training
        cfg.pop(key)
    if args.train:
        use_coco(cfg, args.train, args.val)
    return cfg


def plan(comparison: Comparison, store: CellStore, cfg: Config) -> str:
    """Say what there is to run, and how the configs differ."""
    before, common = cfg.to_dict(), comparison.base.to_dict()
    lines = [f'{comparison.name}, for all methods:']
    lines += [f'  {line}' for line in changed(before, common)]
    first = next(iter(comparison.configs), None)
    for name, config in comparison.configs.items():
        other = common if name == first else comparison.configs[first]
        than = 'the config' if name == first else first
        lines.append(f'{name}, compared with {than}:')
        differences = changed(dict(other), dict(config)) or ['the same']
        lines += [f'  {line}' for line in differences]
    for name, error in comparison.errors.items():
        lines.append(f'{name}: cannot be trained: {error}')
    lines.append('trainings:')
    for cell in comparison.final_cells():
        record = store.read(cell) or {}
        state = 'failed' if 'error' in record else 'done'
        state = state if record else 'to run'
        lines.append(f'  {store.cell_folder(cell)}: {state}')
    return '\n'.join(lines)


def report(comparison: Comparison, store: CellStore, args) -> str:
    """Write the table, the records and the plot; return the table."""
    found = results.collect(comparison, store)
    runs = in_points(found['runs'])
    metrics = metrics_of(runs, args.metrics)
    parts = [
        f'# {comparison.name}\n',
        results.conditions(found) if found['runs'] else '',
        _batches(comparison) + ' Mean over seeds ± half of the 95 % interval '
        f"(Student's t); differences to {args.baseline} with theirs (Welch's "
        't, not corrected for their number), in bold where it excludes 0:\n',
        table(comparison, runs, metrics, args.baseline),
        published(comparison.name),
    ]
    text = '\n'.join(part for part in parts if part)
    path = osp.join(store.folder, 'compare')
    os.makedirs(store.folder, exist_ok=True)
    results.save(found, f'{path}.json')
    with open(f'{path}.md', 'w', encoding='utf-8') as f:
        f.write(text)
    if metrics:
        names = {metric: metric_name(metric) for metric in metrics}
        main_metric, *also = metrics
        spec = dict(
            metric=main_metric,
            metric_name=names[main_metric],
            also={metric: names[metric] for metric in also},
            columns='lr',
        )
        plots.plot_seeds(
            dict(found, runs=runs), spec, ['method'], f'{path}.png'
        )
    return text


def _batches(comparison: Comparison) -> str:
    ours, written = comparison.images_per_update, comparison.schedule_images
    text = (
        f'Images per GPU: {comparison.images_per_gpu}, per optimizer step: '
        f'{ours}.'
    )
    if ours != written:
        text += (
            f' The config is for {written}: its learning rate is multiplied '
            f'by {ours / written:g}.'
        )
    return text


def locked(folder: str):
    """Open a lock that every training holds as long as it runs."""
    os.makedirs(folder, exist_ok=True)
    lock = open(osp.join(folder, 'lock'), 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(
            f'another compare.py, or a training that it left, runs in '
            f'{folder}. Wait for it, or give another --work-dir.'
        ) from error
    return lock


def main():
    args = parse_args()
    methods = read_methods(args)
    if args.baseline is None:
        args.baseline = methods[0].name
    if args.baseline not in [method.name for method in methods]:
        raise UsageError(f'--baseline {args.baseline} is none of the methods.')
    for method in methods:
        if method.like.startswith('sync-') and args.gpus_per_training < 2:
            raise UsageError(
                f'{method.name} shares statistics between the GPUs of one '
                f'training: give --gpus-per-training 2, or take '
                f'{method.like[len("sync-") :]}.'
            )
    cfg = read_config(args)
    name = osp.basename(args.config.rpartition('::')[2])
    comparison = Comparison(
        cfg,
        name,
        methods,
        seeds=args.seeds,
        lrs=args.lr,
        images_per_gpu=args.images_per_gpu,
        images_per_update=args.images_per_update,
        gpus=args.gpus_per_training,
        steps=args.iters,
        num_groups=args.num_groups,
    )
    work_dir = args.work_dir or osp.join(
        'work_dirs', 'compare', osp.splitext(name)[0]
    )
    store = CellStore(work_dir)
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if args.dry_run:
        say(plan(comparison, store, cfg))
        return
    check_datasets(comparison.base, 'train_dataloader', 'test_dataloader')
    for config in comparison.configs.values():
        check_pretrained(config)
    slots = gpu_slots(
        args.gpus and args.gpus.split(','),
        args.gpus_per_training,
        args.workers,
    )
    with locked(work_dir) as lock:
        try:
            run_trainings(
                comparison,
                store,
                slots=slots,
                lock=lock.fileno(),
                retry=args.retry,
                console=console,
                done=lambda: report(comparison, store, args),
            )
        except KeyboardInterrupt:
            say('Stopped. The same command goes on where it was.')
            sys.exit(130)
        say(report(comparison, store, args))
    say(f'{osp.join(work_dir, "compare")}.md, .json, .png')


if __name__ == '__main__':
    run(main)
