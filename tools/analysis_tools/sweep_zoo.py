"""Try ``micro_batch_model`` on the configs of the MM zoos.

Every config is built in a process of its own, without pretrained weights, and
takes one training step on one small image of noise. Then it is looked up:
whether losses, gradients and the updated parameters are finite, which
normalizations it has, and what took the output of every convolution with
Weight Standardization while it ran. Nothing is downloaded.

    python tools/analysis_tools/sweep_zoo.py work_dirs/zoo.json \
        --table configs/ZOO.md

An interrupted sweep goes on where it was: results that the file holds are
kept. ``--retry`` runs those again that did not work.
"""

import argparse
import copy
import datetime
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from pathlib import Path

PACKAGES = ('mmdet', 'mmseg', 'mmpretrain')
ZOO = Path(__file__).with_name('zoo.txt')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description='Try micro_batch_model on the configs of the MM zoos'
    )
    parser.add_argument('results', type=Path, help='JSON file of the results')
    parser.add_argument(
        '--zoo', type=Path, default=ZOO, help='list of configs to try'
    )
    parser.add_argument('--table', type=Path, help='Markdown table to write')
    parser.add_argument(
        '--only', default='', help='regular expression of configs to try'
    )
    parser.add_argument(
        '--retry', action='store_true', help='run again what did not work'
    )
    parser.add_argument(
        '--timeout', type=float, default=300, help='seconds for a config'
    )
    return parser.parse_args(argv)


def read_zoo(path: Path) -> list:
    """The configs of a list: a family above, one config a line, options."""
    family, configs = '', []
    for line in path.read_text().splitlines():
        if line.startswith('#'):
            family = line.lstrip('# ')
        elif line.strip():
            config, *options = line.split()
            if config.split('::')[0] not in PACKAGES or '::' not in config:
                raise SystemExit(
                    f'{path}: expected a config as mmdet::folder/name.py, '
                    f'got {config!r}'
                )
            options = dict(option.split('=') for option in options)
            configs.append(
                dict(config=config, family=family)
                | {k: int(v) for k, v in options.items()}
            )
    return configs


# What a process of its own does ------------------------------------------


def read_config(config: str):
    """A zoo config whose model has nothing that would be downloaded."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    package, name = config.split('::')
    module = importlib.import_module(package)
    zoo = Path(module.__file__).parent / '.mim' / 'configs'
    cfg = Config.fromfile(zoo / name)
    init_default_scope(package)
    model = cfg.model
    preprocessor = cfg.get('data_preprocessor')
    if preprocessor and 'data_preprocessor' not in model:
        model.data_preprocessor = preprocessor
    without_pretrained(model)
    if 'teacher_config' in model:  # a path from the root of mmdet
        model.teacher_config = str(
            zoo / model.teacher_config.split('configs/')[1]
        )
        model.teacher_ckpt = None
    return cfg


def without_pretrained(cfg) -> None:
    """Drop pretrained weights in place, at any depth."""
    if isinstance(cfg, (list, tuple)):
        for value in cfg:
            without_pretrained(value)
    if not isinstance(cfg, dict):
        return
    if cfg.get('pretrained') is not None:
        cfg['pretrained'] = None
    init = cfg.get('init_cfg')
    if isinstance(init, dict) and 'checkpoint' in init:
        cfg['init_cfg'] = None
    for value in cfg.values():
        without_pretrained(value)


def without_batch_augments(model: dict, size: int) -> None:
    """Let one small image stay small."""
    preprocessor = model.get('data_preprocessor')
    if preprocessor:
        if preprocessor.get('batch_augments'):
            preprocessor['batch_augments'] = None
        if preprocessor.get('size'):
            preprocessor['size'] = (size, size)
    train_cfg = model.get('train_cfg')
    if train_cfg and 'augments' in train_cfg:
        train_cfg.pop('augments')


def with_few_samples(cfg) -> None:
    """Let a detector train on some dozens of regions, not hundreds."""
    if isinstance(cfg, (list, tuple)):
        for value in cfg:
            with_few_samples(value)
    if not isinstance(cfg, dict):
        return
    for key, most in (('num', 32), ('max_per_img', 64), ('nms_pre', 256)):
        if isinstance(cfg.get(key), int):
            cfg[key] = min(cfg[key], most)
    for value in cfg.values():
        with_few_samples(value)


def find(cfg, key: str) -> list:
    """All the values of a key, at any depth."""
    found = []
    if isinstance(cfg, dict):
        found += [cfg[key]] if key in cfg else []
        cfg = list(cfg.values())
    if isinstance(cfg, (list, tuple)):
        for value in cfg:
            found += find(value, key)
    return found


def demo_batch(package: str, cfg: dict, size: int) -> dict:
    """One image of noise with annotations, as the data loader returns it."""
    import torch

    model_cfg, loader = cfg['model'], cfg.get('train_dataloader') or {}

    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    classes = [n for n in find(model_cfg, 'num_classes') if n]
    num_classes = min([n for n in classes if isinstance(n, int)], default=10)
    if package == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        transforms = str(find(loader, 'type'))
        panoptic = 'LoadPanopticAnnotations' in transforms
        return demo_mm_inputs(
            1,
            (3, size, size),
            num_items=[4],
            num_classes=min(num_classes, 10),
            # HTC learns semantic maps of stride 8.
            sem_seg_output_strides=8 if 'SegRescale' in transforms else 1,
            with_mask=panoptic or any(find(loader, 'with_mask')),
            with_semantic=panoptic or any(find(loader, 'with_seg')),
            use_box_type=True,
        )
    if package == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        sample = SegDataSample(
            metainfo=dict(img_shape=(size, size), ori_shape=(size, size))
        )
        labels = torch.randint(0, max(num_classes, 2), (1, size, size))
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=(labels == 0).long())
        return dict(inputs=[image], data_samples=[sample])
    from mmpretrain.structures import DataSample

    preprocessor = model_cfg.get('data_preprocessor') or {}
    if preprocessor.get('type') == 'SelfSupDataPreprocessor':
        return dict(
            inputs=[image[None], image.flip(2)[None]],
            data_samples=[DataSample()],
        )
    sample = DataSample().set_gt_label([1])
    return dict(inputs=[image], data_samples=[sample])


def train_one_step(model, batch: dict) -> dict:
    """One step of SGD; what it did, and what took the convolutions' output."""
    import torch
    from mmengine.logging import MessageHub

    from wsbcn_mm import BCN
    from wsbcn_mm.consumers import record_consumers

    model.train()
    frozen = [
        name
        for name, m in model.named_modules()
        if isinstance(m, BCN) and not m.training
    ]
    MessageHub.get_current_instance().update_info('epoch', 0)  # TOOD asks
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4
    )
    data = model.data_preprocessor(batch, True)
    with record_consumers(model) as consumers:
        losses = model(**data, mode='loss')
    loss, values = model.parse_losses(losses)
    loss.backward()
    not_finite = [k for k, v in values.items() if not v.isfinite().all()]
    gradients = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    optimizer.step()
    moved = [
        name
        for name, t in model.state_dict().items()
        if t.is_floating_point() and not t.isfinite().all()
    ]
    return dict(
        loss=float(loss),
        frozen=frozen,
        not_finite=not_finite + gradients + moved,
        consumers=consumers,
    )


def normalizations(model) -> dict:
    """What the model normalizes with, and what is left of BN."""
    from mmcv.ops import SyncBatchNorm
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    from wsbcn_mm.layers import ConvWS, ConvWS1d, ConvWS3d
    from wsbcn_mm.layers._base import NormBase

    named = dict(model.named_modules())
    return dict(
        ours=sum(isinstance(m, NormBase) for m in named.values()),
        standardized=sum(
            isinstance(m, (ConvWS, ConvWS1d, ConvWS3d)) for m in named.values()
        ),
        layer_norms=sum(
            'LayerNorm' in type(m).__name__ for m in named.values()
        ),
        group_norms=sum(
            isinstance(m, nn.GroupNorm) and not isinstance(m, NormBase)
            for m in named.values()
        ),
        batch_norms=[
            name
            for name, m in named.items()
            if isinstance(m, (_BatchNorm, SyncBatchNorm))
            and not isinstance(m, NormBase)
        ],
    )


def misplaced(model, consumers) -> dict:
    """Standardized convolutions with something else than a norm behind."""
    from wsbcn_mm.layers import ConvWS, ConvWS1d, ConvWS3d

    names = {m: name for name, m in model.named_modules()}
    ran = {m for m in names if m in consumers.others or m in consumers.norms}
    return {
        names[m]: ', '.join(sorted(consumers.others[m]))
        for m in names
        if isinstance(m, (ConvWS, ConvWS1d, ConvWS3d))
        and m in ran
        and not consumers.only_normalizations(m)
    }


def not_standardized(model, consumers) -> list:
    """Plain convolutions that only a normalization of ours follows."""
    from torch import nn

    from wsbcn_mm.layers import ConvWS, ConvWS1d, ConvWS3d
    from wsbcn_mm.layers._base import NormBase

    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and not isinstance(m, (ConvWS, ConvWS1d, ConvWS3d))
        and m.weight[0].numel() > 1
        and consumers.only_normalizations(m)
        and all(isinstance(n, NormBase) for n in consumers.norms[m])
    ]


def build(package: str, cfg: dict):
    registry = importlib.import_module(f'{package}.registry')
    model = registry.MODELS.build(copy.deepcopy(cfg))
    model.init_weights()
    return model


def summary(error: BaseException) -> str:
    text = str(error).strip().splitlines() or ['']
    line = next((t for t in reversed(text) if t.strip()), '').strip()
    return f'{type(error).__name__}: {line}'[:200]


def try_config(config: str, size: int) -> dict:
    """Everything the table says about a config."""
    import torch
    from mmengine.model import revert_sync_batchnorm

    from wsbcn_mm import micro_batch_model
    from wsbcn_mm.engine.config import is_converted

    torch.manual_seed(0)
    package = config.split('::')[0]
    cfg = read_config(config)
    original = cfg.model
    without_batch_augments(original, size)
    with_few_samples(original.get('train_cfg'))
    batch = demo_batch(package, cfg, size)
    result = dict(config=config, size=size)
    before = {}
    try:
        model = build(package, original)
        before = normalizations(model)
        result['batch_norms_before'] = len(before['batch_norms'])
    except Exception as error:  # SyncBN of mmcv wants a process group
        traceback.print_exc()
        result['error_before'] = summary(error)
    try:
        try:
            model_cfg = micro_batch_model(original)
        except ValueError as error:
            if 'no normalization to replace' not in str(error):
                raise
            model_cfg = original
            result['refused'] = summary(error)
        model = build(package, model_cfg)
        result['converted'] = is_converted(model_cfg)
        result.update(normalizations(model))
        step = train_one_step(model, copy.deepcopy(batch))
        result['misplaced'] = misplaced(model, step['consumers'])
        result['not_standardized'] = not_standardized(model, step['consumers'])
        for key in ('loss', 'not_finite', 'frozen'):
            result[key] = step[key]
    except Exception as error:
        traceback.print_exc()
        result['error'] = summary(error)
        try:
            train_one_step(
                revert_sync_batchnorm(build(package, original)), batch
            )
        except Exception as error:
            traceback.print_exc()
            result['error_before'] = summary(error)
    result['status'] = judge(result)
    return result


def judge(result: dict) -> str:
    """One word for a result."""
    if result.get('error'):
        return 'fails as before' if result.get('error_before') else 'fails'
    if result['not_finite']:
        return 'not finite'
    if result['misplaced']:
        return 'WS misplaced'
    if result.get('batch_norms_before') == 0:
        return 'no BN'
    if result['batch_norms'] or result['frozen']:
        return 'partly'
    return 'converted' if result['converted'] else 'works'


def work(config: str, size: int, path: str, log: str) -> None:
    """Try one config in this process, whose output goes to a log."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    start = time.time()
    try:
        result = try_config(config, size)
    except BaseException as error:
        traceback.print_exc()
        result = dict(config=config, error=summary(error), status='fails')
    result['seconds'] = round(time.time() - start, 1)
    Path(path).write_text(json.dumps(result))


# The sweep ------------------------------------------------------------------


def sweep(configs: list, results: dict, path: Path, timeout: float) -> None:
    """Run what has no result yet, one process after the other."""
    context = multiprocessing.get_context('forkserver')
    # Imported once: each config's process is a copy of one that has them.
    packages = sorted({item['config'].split('::')[0] for item in configs})
    context.set_forkserver_preload([f'{p}.models' for p in packages])
    logs = path.with_suffix('.logs')
    logs.mkdir(parents=True, exist_ok=True)
    answer = logs / 'answer.json'
    for index, item in enumerate(configs, 1):
        config = item['config']
        print(f'[{index}/{len(configs)}] {config}', end=' ', flush=True)
        if config in results:
            print('kept:', results[config]['status'])
            continue
        answer.unlink(missing_ok=True)
        log = logs / (re.sub(r'\W+', '-', config) + '.log')
        process = context.Process(
            target=work,
            args=(config, item.get('size', 128), str(answer), str(log)),
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            error = f'no result after {timeout:g} s'
        else:
            error = f'its process ended with exit code {process.exitcode}'
        if answer.exists():
            results[config] = json.loads(answer.read_text())
        else:
            results[config] = dict(config=config, error=error, status='fails')
        print(results[config]['status'], results[config].get('error', ''))
        path.write_text(json.dumps(results, indent=1))


def note(result: dict) -> str:
    """Why a config is not simply working, in words."""
    notes = []
    if 'error' in result:
        notes.append(f'`{result["error"]}`')
    if result.get('error_before'):
        notes.append(f'unchanged: `{result["error_before"]}`')
    if 'error' in result:
        return '; '.join(notes).replace('|', '\\|')

    def some(names):
        names = sorted({re.sub(r'\d+', '*', n) for n in names})
        more = f' and {len(names) - 3} more' if len(names) > 3 else ''
        return ', '.join(f'`{n}`' for n in names[:3]) + more

    if 'refused' in result:
        notes.append('`micro_batch_model` refuses: no config reaches any')
    if result['not_finite']:
        notes.append(f'not finite: {some(result["not_finite"])}')
    if result['misplaced']:
        places = [f'{k} ({v})' for k, v in result['misplaced'].items()]
        notes.append(f'WS before {some(places)}')
    left = result['batch_norms']
    if left:
        notes.append(f'{len(left)} BN stay: {some(left)}')
    if result['frozen']:
        notes.append(f'estimates frozen: {some(result["frozen"])}')
    if result['not_standardized']:
        names = result['not_standardized']
        notes.append(f'{len(names)} plain before BCN: {some(names)}')
    for kind, name in (('layer_norms', 'LayerNorm'), ('group_norms', 'GN')):
        if result[kind]:
            notes.append(f'{result[kind]} {name} stay')
    return '; '.join(notes).replace('|', '\\|')


def versions() -> str:
    found = []
    for name in ('torch', 'mmengine', 'mmcv', *PACKAGES, 'wsbcn_mm'):
        found.append(f'{name} {importlib.import_module(name).__version__}')
    return ', '.join(found)


HEADER = """\
# What `micro_batch_model` does to the zoos

Made by `tools/analysis_tools/sweep_zoo.py` on {date} with {versions}.

Each config's model, changed by `micro_batch_model` with its defaults, was
built without pretrained weights and took one training step on one image of
noise (128x128 where the model allows it) on a CPU. This says that it builds,
trains and is normalized as meant. It says nothing about accuracy.

| result | configs | |
| --- | ---: | --- |
{counts}

Columns: BN layers before, layers of this package after, convolutions with
Weight Standardization. "Plain before BCN" is a convolution without it, of a
kind of its own, or of which it is not seen that only a BCN follows.

```shell
python tools/analysis_tools/sweep_zoo.py work_dirs/zoo.json \\
    --table configs/ZOO.md
```
"""

MEANINGS = {
    'works': 'no BN left, everything finite, WS only before a normalization',
    'converted': 'the same; a class has BN or convolutions that no config '
    'reaches, so that the built model is converted',
    'no BN': 'had none: LayerNorm and GN stay as they are',
    'partly': 'trains, but something is left: the note says what',
    'WS misplaced': 'a standardized output that nothing normalizes',
    'not finite': 'a loss, a gradient or a parameter is not',
    'fails': 'does not build or train',
    'fails as before': 'neither does the unchanged config in this setting',
}


def table(configs: list, results: dict) -> str:
    """The results as Markdown."""
    done = [i for i in configs if i['config'] in results]
    status = [results[i['config']]['status'] for i in done]
    counts = '\n'.join(
        f'| {name} | {status.count(name)} | {meaning} |'
        for name, meaning in MEANINGS.items()
        if name in status
    )
    date = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [HEADER.format(date=date, versions=versions(), counts=counts)]
    family = None
    for item in done:
        result = results[item['config']]
        if item['family'] != family:
            family = item['family']
            lines += [
                f'\n## {family}\n',
                '| config | result | BN | after | WS | notes |',
                '| --- | --- | ---: | ---: | ---: | --- |',
            ]
        numbers = ' | '.join(
            str(numbers)
            for numbers in (
                result.get('batch_norms_before', ''),
                result.get('ours', ''),
                result.get('standardized', ''),
            )
        )
        name = item['config'].split('::')[1]
        lines.append(
            f'| {name} | {result["status"]} | {numbers} | {note(result)} |'
        )
    return '\n'.join(lines) + '\n'


def main(argv=None) -> int:
    args = parse_args(argv)
    configs = [
        item
        for item in read_zoo(args.zoo)
        if re.search(args.only, item['config'])
    ]
    if not configs:
        raise SystemExit(f'no config of {args.zoo} matches {args.only!r}')
    results = {}
    if args.results.exists():
        results = json.loads(args.results.read_text())
    if args.retry:
        good = ('works', 'converted', 'no BN')
        chosen = {item['config'] for item in configs}
        results = {
            k: v
            for k, v in results.items()
            if k not in chosen or v['status'] in good
        }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    sweep(configs, results, args.results, args.timeout)
    if args.table:
        args.table.write_text(table(configs, results))
    bad = ('fails', 'not finite', 'WS misplaced')
    return int(any(results[i['config']]['status'] in bad for i in configs))


if __name__ == '__main__':
    sys.exit(main())
