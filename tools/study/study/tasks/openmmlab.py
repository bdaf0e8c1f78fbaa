"""A config of MMDetection or MMSegmentation on digit scenes, with its Runner.

The config's model gets the method's layers by ``micro_batch_model``, for
every method alike, so that the networks differ in nothing else. The optimizer
is the config's, its step fixed at ``batch_size`` images by accumulating
gradients. Learning rates are tuned on scenes of their own.

With ``pretrained`` the backbone starts from a classifier of digit crops that
was trained with the method's layers, once for all seeds, in batches of 16. The
method ``'BN-frozen'`` is what the zoo does with one or two images then:
statistics and running averages stay as they were loaded, and neck and heads
have no normalization. With ``head_method`` all but the backbone has that
method's layers. With ``separable_ws`` the separable convolutions of DeepLabV3+
are the method's too, which no config reaches. With ``zoo_optimizer`` the
optimizer is that of the library's own schedules, SGD, instead of the config's,
and does not clip gradients unless ``clip_grad`` says to which norm.
With ``one_pass`` a segmenter sees the images of a step at once and only the
normalizations ``images`` at a time: faster, and the same but for dropout's
random numbers and for a loss with class weights, which MMSegmentation divides
by their sum over what it sees at once. With several ``processes`` each
has ``images`` at a time, and ``sync`` says what they share besides gradients:
nothing, ``'estimates'`` after each iteration, or the moments in ``'layers'``.
"""

import copy
import glob
import json
import os
import os.path as osp
import shutil
import subprocess
import sys
import tempfile
from typing import List

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from wsbcn_mm import BCN, micro_batch_model
from wsbcn_mm.engine.command_line import build_runner

from ..methods import method_cfg
from ..micro_batches import normalize_in_micro_batches
from ..scheduled_rates import ScheduledRates

ROOT = osp.join(osp.dirname(osp.abspath(__file__)), *4 * [osp.pardir])
CONVERTERS = osp.join(ROOT, 'tools', 'dataset_converters')
CLASSIFIER = osp.join(
    *(ROOT, 'configs', 'digits_transfer'),
    'resnet18-slim_bcn-ws_1xb16-4e_digit-crops.py',
)
FROZEN = 'BN-frozen'
SCENES_SEED = dict(test=0, val=1)
ZOO_SCHEDULES = dict(
    mmdet='mmdet::_base_/schedules/schedule_1x.py',
    mmseg='mmseg::_base_/schedules/schedule_20k.py',
)
DEFAULTS = dict(
    batch_size=4,
    num_groups=4,
    update_rate=None,
    channel_affine='group',
    grad_averaging=None,
    head_method=None,
    image_pool=None,
    separable_ws=False,
    fresh_estimates=False,
    scheduled=False,
    simulated_batch_size=None,
    zoo_optimizer=False,
    clip_grad=None,
    one_pass=False,
    processes=1,
    sync=None,
    spread=0.5,
    num_train=300,
    num_val=300,
    image_size=160,
    pretrained=False,
)


def data_root(settings: dict) -> str:
    """Where the scenes of a cell are."""
    keys = ('spread', 'num_train', 'num_val', 'image_size')
    name = '-'.join(f'{settings[key]:g}' for key in keys)
    seed = SCENES_SEED[settings['split']]
    return osp.join('data', 'study', f'{name}-{seed}') + osp.sep


def prepare(cells: List[dict]) -> None:
    """Make the scenes and the classifiers that cells ask for, before any."""
    for settings in ({**DEFAULTS, **cell} for cell in cells):
        _make_scenes(settings)
        if settings['pretrained']:
            _train_classifier(settings)


def _make_scenes(settings: dict) -> None:
    out = data_root(settings)
    if osp.isfile(osp.join(out, 'manifest.json')):
        return
    arguments = [
        f'--out={out}',
        f'--seed={SCENES_SEED[settings["split"]]}',
        f'--spread={settings["spread"]}',
        f'--num-train={settings["num_train"]}',
        f'--num-val={settings["num_val"]}',
        f'--image-size={settings["image_size"]}',
    ]
    subprocess.run(
        [sys.executable, osp.join(CONVERTERS, 'digit_scenes.py'), *arguments],
        check=True,
    )


def _train_classifier(settings: dict) -> None:
    """Train what :func:`classifier` names."""
    out = classifier(settings)
    if osp.isfile(out):
        return
    # Crops of the scenes that learning rates are tuned on, for both splits:
    # other scenes than those of the results, though not all other digits.
    settings = {**settings, 'split': 'val'}
    _make_scenes(settings)
    crops = f'{data_root(settings).rstrip(os.sep)}-crops'
    if not osp.isdir(osp.join(crops, 'val')):
        converter = osp.join(CONVERTERS, 'digit_crops.py')
        subprocess.run(
            [
                *(sys.executable, converter),
                *(f'--scenes={data_root(settings)}', f'--out={crops}'),
            ],
            check=True,
        )
    cfg = Config.fromfile(CLASSIFIER)
    norm_cfg, conv_cfg = method_cfg(
        settings['method'],
        images=cfg.train_dataloader.batch_size,
        batch_size=cfg.train_dataloader.batch_size,
        num_groups=settings['num_groups'],
        update_rate=0.1,  # BN's: all results start from what it gave
    )
    cfg.model = micro_batch_model(
        cfg.model, norm_cfg, conv_cfg or dict(type='Conv2d'), pretrained=False
    )
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = crops + os.sep
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.log_level = 'WARNING'
    print(f'Training a classifier: {out}', flush=True)
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        Runner.from_cfg(cfg).train()
        (trained,) = glob.glob(osp.join(cfg.work_dir, 'epoch_*.pth'))
        os.makedirs(osp.dirname(out), exist_ok=True)
        shutil.copy(trained, f'{out}.part')
    os.replace(f'{out}.part', out)


def classifier(settings: dict) -> str:
    """The checkpoint that a pretrained cell starts from."""
    method = settings['method'].replace(FROZEN, 'BN')
    keys = ('num_groups', 'spread', 'num_train', 'image_size')
    name = '-'.join(f'{settings[key]:g}' for key in keys)
    return osp.join('data', 'study', 'classifiers', f'{method}-{name}.pth')


def build_model(model_cfg: dict, settings: dict) -> dict:
    """The model of a config with the layers of the method."""
    if settings['head_method']:
        backbone = {**settings, 'head_method': None}
        heads = {**backbone, 'method': settings['head_method']}
        model = build_model(copy.deepcopy(model_cfg), heads)
        model.backbone = build_model(model_cfg, backbone).backbone
        return model
    start = classifier(settings) if settings['pretrained'] else False
    if settings['method'] == FROZEN:
        if not start:
            raise ValueError(f'{FROZEN} needs pretrained=True.')
        model_cfg.backbone.norm_eval = True
        model_cfg.backbone.init_cfg = dict(type='Pretrained', checkpoint=start)
    else:
        norm_cfg, conv_cfg = method_cfg(
            settings['method'],
            images=settings['images'],
            batch_size=settings['batch_size'],
            num_groups=settings['num_groups'],
            update_rate=settings['update_rate'],
            channel_affine=settings['channel_affine'],
            grad_averaging=settings['grad_averaging'],
            simulated_batch_size=settings['simulated_batch_size'],
        )
        model_cfg = micro_batch_model(
            model_cfg,
            norm_cfg,
            conv_cfg or dict(type='Conv2d'),
            pretrained=start,
            convert=settings['separable_ws'],
        )
    if start:  # of the classifier, that is
        model_cfg.backbone.init_cfg['prefix'] = 'backbone.'
    return model_cfg


def build_config(settings: dict, work_dir: str) -> Config:
    """The config of one training."""
    cfg = Config.fromfile(osp.join(ROOT, settings['config']))
    batch_size = settings['batch_size']
    images = batch_size if settings['one_pass'] else settings['images']
    cfg.model = build_model(cfg.model, settings)
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
    forwards = batch_size // (images * settings['processes'])
    iters = settings['steps'] * forwards
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=iters, val_interval=iters
    )
    if settings['zoo_optimizer']:
        schedule = f"_base_ = '{ZOO_SCHEDULES[cfg.default_scope]}'"
        schedule = Config.fromstring(schedule, '.py')
        cfg.optim_wrapper = schedule.optim_wrapper
    cfg.optim_wrapper.optimizer.lr = settings['lr']
    cfg.optim_wrapper.accumulative_counts = forwards
    if settings['clip_grad'] is not None:
        cfg.optim_wrapper.clip_grad = dict(max_norm=settings['clip_grad'])
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
    cfg.launcher = 'pytorch' if settings['processes'] > 1 else 'none'
    if settings['sync'] == 'estimates':
        cfg.custom_hooks.append(dict(type='SyncEstimatesHook'))
    elif settings['sync'] == 'layers':
        cfg.sync_bn = 'torch'
    cfg.randomness = dict(seed=settings['seed'])
    cfg.work_dir = work_dir
    name = osp.basename(work_dir)  # several trainings share a process
    cfg.experiment_name = name
    cfg.visualizer = dict(
        type='Visualizer', name=name, vis_backends=cfg.vis_backends
    )
    cfg.log_level = 'WARNING'
    return cfg


def _pool_with_group_norm(head: nn.Module) -> None:
    """Give the image pooling of DeepLab, which no config reaches, a GN."""
    convolution = head.image_pool[1]
    norm = convolution.norm
    group_norm = nn.GroupNorm(norm.num_groups, norm.num_features)
    setattr(convolution, convolution.norm_name, group_norm)


class _FreshEstimates(Hook):
    """Forget the classifier's estimates, which are of other images."""

    def before_train(self, runner: Runner) -> None:
        for module in runner.model.backbone.modules():
            if isinstance(module, BCN):
                module.reset_running_stats()


def run(settings: dict) -> dict:
    """Train, and evaluate with the library's own metric."""
    settings = {**DEFAULTS, **settings}
    if settings['processes'] == 1:
        return _train(settings)
    with tempfile.TemporaryDirectory() as folder:
        answer = osp.join(folder, 'metrics.json')
        torch.multiprocessing.spawn(
            _train_as_one_of_several,
            args=(settings, get_free_port(), torch.get_num_threads(), answer),
            nprocs=settings['processes'],
        )
        with open(answer, encoding='utf-8') as file:
            return json.load(file)


def _train_as_one_of_several(
    rank: int, settings: dict, port: int, threads: int, answer: str
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(settings['processes']),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(threads)
    metrics = _train(settings)
    if rank == 0:
        with open(answer, 'w', encoding='utf-8') as file:
            json.dump(metrics, file)


class _ScheduledRate(Hook):
    """Let BCN's update rate follow the learning rate from its highest."""

    def before_train(self, runner: Runner) -> None:
        self.rates = ScheduledRates(runner.model)

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        group = runner.optim_wrapper.param_groups[0]
        self.rates.set(group['lr'] / group['initial_lr'])


def build_training(settings: dict, work_dir: str) -> Runner:
    """The Runner of one training, with what no config reaches."""
    runner = build_runner(build_config(settings, work_dir))
    if settings['image_pool'] == 'GN':
        _pool_with_group_norm(runner.model.decode_head)
    if settings['one_pass']:
        normalize_in_micro_batches(runner.model, settings['images'])
    if settings['fresh_estimates']:
        runner.register_hook(_FreshEstimates())
    if settings['scheduled']:
        runner.register_hook(_ScheduledRate())
    return runner


def _train(settings: dict) -> dict:
    with tempfile.TemporaryDirectory() as work_dir:
        runner = build_training(settings, work_dir)
        runner.train()
        scalars = runner.message_hub.log_scalars
    metrics = {
        name.split('/')[-1]: float(history.current())
        for name, history in scalars.items()
        if name.startswith('val/') and 'time' not in name
    }
    if not metrics:  # MMDetection has none without a prediction
        raise RuntimeError('The training diverged: nothing is predicted.')
    for name in ('norm_off', 'norm_distance'):
        if f'train/{name}' in scalars:
            metrics[name] = float(scalars[f'train/{name}'].current())
    for name, history in scalars.items():
        if name.startswith('train/loss'):  # the mean of the last fifth
            count = max(runner.max_iters // 5, 1)
            metrics[name.split('/')[-1]] = float(history.mean(count))
    return metrics
