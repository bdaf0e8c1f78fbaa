"""A config of MMDetection or MMSegmentation on digit scenes, with its Runner.

The config's model gets the method's layers by ``micro_batch_model``, for
every method alike, so that the networks differ in nothing else. The optimizer
is the config's, its step fixed at ``batch_size`` images by accumulating
gradients. Learning rates are tuned on scenes of their own.
"""

import os.path as osp
import subprocess
import sys
import tempfile
from typing import List

from mmengine.config import Config
from mmengine.runner import Runner

from wsbcn_mm import micro_batch_model

from ..methods import method_cfg

ROOT = osp.join(osp.dirname(osp.abspath(__file__)), *4 * [osp.pardir])
CONVERTER = osp.join(ROOT, 'tools', 'dataset_converters', 'digit_scenes.py')
SCENES_SEED = dict(test=0, val=1)
DEFAULTS = dict(
    batch_size=4,
    num_groups=4,
    update_rate=None,
    channel_affine='group',
    spread=0.5,
    num_train=300,
    num_val=300,
    image_size=160,
)


def data_root(settings: dict) -> str:
    """Where the scenes of a cell are."""
    keys = ('spread', 'num_train', 'num_val', 'image_size')
    name = '-'.join(f'{settings[key]:g}' for key in keys)
    seed = SCENES_SEED[settings['split']]
    return osp.join('data', 'study', f'{name}-{seed}') + osp.sep


def prepare(cells: List[dict]) -> None:
    """Make the scenes that cells ask for, before any of them runs."""
    for settings in ({**DEFAULTS, **cell} for cell in cells):
        out = data_root(settings)
        if osp.isfile(osp.join(out, 'manifest.json')):
            continue
        arguments = [
            f'--out={out}',
            f'--seed={SCENES_SEED[settings["split"]]}',
            f'--spread={settings["spread"]}',
            f'--num-train={settings["num_train"]}',
            f'--num-val={settings["num_val"]}',
            f'--image-size={settings["image_size"]}',
        ]
        subprocess.run([sys.executable, CONVERTER, *arguments], check=True)


def build_config(settings: dict, work_dir: str) -> Config:
    """The config of one training."""
    cfg = Config.fromfile(osp.join(ROOT, settings['config']))
    images, batch_size = settings['images'], settings['batch_size']
    norm_cfg, conv_cfg = method_cfg(
        settings['method'],
        images=images,
        batch_size=batch_size,
        num_groups=settings['num_groups'],
        update_rate=settings['update_rate'],
        channel_affine=settings['channel_affine'],
    )
    cfg.model = micro_batch_model(
        cfg.model,
        norm_cfg,
        conv_cfg or dict(type='Conv2d'),
        images_per_gpu=images,
        images_per_update=batch_size,
        pretrained=False,
    )
    root = data_root(settings)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = root
    if 'ann_file' in cfg.val_evaluator:
        cfg.val_evaluator.ann_file = osp.join(
            root, 'annotations', 'instances_val.json'
        )
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.train_dataloader.batch_size = images
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    forwards = batch_size // images
    iters = settings['steps'] * forwards
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=iters, val_interval=iters
    )
    cfg.optim_wrapper.optimizer.lr = settings['lr']
    cfg.optim_wrapper.accumulative_counts = forwards
    warmup = min(50 * forwards, iters // 2)
    cfg.param_scheduler = [
        dict(
            type='LinearLR',
            start_factor=0.01,
            by_epoch=False,
            begin=0,
            end=max(warmup, 1),
        ),
        dict(
            type='CosineAnnealingLR',
            by_epoch=False,
            begin=0,
            end=iters,
            T_max=iters,
            eta_min_ratio=0.01,
        ),
    ]
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.pop('visualization', None)
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=100)
    cfg.custom_hooks = [
        dict(type='NormalizationMonitorHook', interval=max(iters // 10, 1))
    ]
    cfg.randomness = dict(seed=settings['seed'])
    cfg.work_dir = work_dir
    name = osp.basename(work_dir)  # several trainings share a process
    cfg.experiment_name = name
    cfg.visualizer = dict(
        type='Visualizer', name=name, vis_backends=cfg.vis_backends
    )
    cfg.log_level = 'WARNING'
    return cfg


def run(settings: dict) -> dict:
    """Train, and evaluate with the library's own metric."""
    settings = {**DEFAULTS, **settings}
    with tempfile.TemporaryDirectory() as work_dir:
        runner = Runner.from_cfg(build_config(settings, work_dir))
        runner.train()
        scalars = runner.message_hub.log_scalars
    metrics = {
        name.split('/')[-1]: float(history.current())
        for name, history in scalars.items()
        if name.startswith('val/') and 'time' not in name
    }
    for name in ('norm_off', 'norm_distance'):
        if f'train/{name}' in scalars:
            metrics[name] = float(scalars[f'train/{name}'].current())
    return metrics
