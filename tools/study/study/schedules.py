"""Fit the schedule of a config to other numbers of images and steps.

Schedules count iterations. An iteration of one image is a sixteenth of one of
16 images, so whoever changes the batch size has to multiply every count of
iterations in the config. The functions here do that.
"""

import math
import re
from typing import Any, Callable, Iterator, Optional

from mmengine.config import Config

from wsbcn_mm.engine.command_line import UsageError
from wsbcn_mm.engine.components import class_name

# Arguments of parameter schedulers that count epochs or iterations.
SCHEDULER_COUNTS = (
    'begin',
    'end',
    'T_max',
    'milestones',
    'periods',
    'step_size',
    'total_steps',
)
LOOP_COUNTS = ('val_begin', 'val_interval', 'dynamic_intervals')


def images_of_schedule(cfg: Config, name: str) -> Optional[int]:
    """Return the images per optimizer step that a config is written for.

    Args:
        cfg (Config): A whole config.
        name (str): Its file name. A part such as ``4xb2``, GPUs times images
            per GPU, goes before ``auto_scale_lr.base_batch_size``, which many
            configs of the zoo inherit without its being theirs.

    Returns:
        int | None: None where neither says it.
    """
    named = re.search(r'(?:^|[_-])(\d+)xb(\d+)(?:[_.-]|$)', name)
    if named:
        images = int(named[1]) * int(named[2])
    else:
        images = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    counts = cfg.optim_wrapper.get('accumulative_counts', 1)
    return images and round(images * counts)


def set_images(
    cfg: Config,
    images_per_gpu: int,
    images_per_update: int,
    gpus: int,
    schedule_images: int,
) -> None:
    """Change the batch size of a config, and every count of iterations.

    A training sees as many images as before, at the same points of its
    schedule. If an optimizer step has other numbers of images than the
    config was written for, the learning rate is scaled in proportion.

    Args:
        cfg (Config): A whole config, changed in place.
        images_per_gpu (int): Images in one forward pass.
        images_per_update (int): Images in one optimizer step, over all GPUs
            and accumulated passes.
        gpus (int): Number of processes.
        schedule_images (int): Images per optimizer step that the config is
            written for.

    Raises:
        UsageError: If a step is no whole number of passes.
    """
    counts, rest = divmod(images_per_update, images_per_gpu * gpus)
    if rest or not counts:
        raise UsageError(
            f'{images_per_update} images per optimizer step are no multiple '
            f'of {images_per_gpu} per GPU times {gpus} GPUs.'
        )
    before = schedule_images / cfg.optim_wrapper.get('accumulative_counts', 1)
    factor = before / (images_per_gpu * gpus)
    cfg.train_dataloader.batch_size = images_per_gpu
    cfg.optim_wrapper.accumulative_counts = counts
    if images_per_update != schedule_images:
        optimizer = cfg.optim_wrapper.get('optimizer') or {}
        if 'lr' not in optimizer:
            raise UsageError(
                f'the learning rate is for {schedule_images} images per '
                'optimizer step, and optim_wrapper.optimizer.lr is not there '
                f'to be scaled to {images_per_update}.'
            )
        optimizer.lr *= images_per_update / schedule_images
    cfg.auto_scale_lr = dict(
        enable=False, base_batch_size=images_per_gpu * gpus
    )

    def scaled(count: float) -> int:
        return max(round(count * factor), 1) if count else 0

    def whole_steps(count: float) -> int:
        return counts * max(round(count * factor / counts), 1)

    loop = cfg.train_cfg
    if 'max_iters' in loop:
        iters = whole_steps(loop.max_iters)
        _scale(loop, LOOP_COUNTS, scaled)
        loop.max_iters = iters
    for scheduler in _schedulers(cfg):
        if not scheduler.get('by_epoch', True):
            _scale(scheduler, SCHEDULER_COUNTS, scaled)
            if class_name(scheduler['type']).startswith('Exponential'):
                scheduler['gamma'] **= 1 / factor
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint')
    if checkpoint and not checkpoint.get('by_epoch', True):
        # A checkpoint between the passes of one step would lose gradients.
        _scale(checkpoint, ('interval', 'save_begin'), whole_steps)
    for hook in cfg.get('custom_hooks') or []:
        if class_name(hook['type']) == 'EMAHook':
            _scale(hook, ('begin_iter', 'gamma'), scaled)
            hook['momentum'] = hook.get('momentum', 0.0002) / factor


def shorten(cfg: Config, steps: int) -> None:
    """Let a config train for a number of optimizer steps.

    What its schedulers do at a third of the training they do at a third of
    the short one. A warm-up that counts iterations where the training counts
    epochs is kept, and is at most a tenth of the training.

    Args:
        cfg (Config): A whole config, changed in place.
        steps (int): The number of optimizer steps.
    """
    counts = cfg.optim_wrapper.get('accumulative_counts', 1)
    iters = steps * counts
    loop = cfg.train_cfg
    by_epoch = 'max_iters' not in loop
    factor = iters / (loop.max_epochs if by_epoch else loop.max_iters)

    def scaled(count: float) -> int:
        return max(round(count * factor), 1) if count else 0

    def warm_up(count: float) -> int:
        return min(count, max(iters // 10, 1)) if count else 0

    for scheduler in _schedulers(cfg):
        counts_epochs = scheduler.pop('by_epoch', True)
        scheduler.pop('convert_to_iter_based', None)
        scheduler['by_epoch'] = False
        same = counts_epochs == by_epoch
        _scale(scheduler, SCHEDULER_COUNTS, scaled if same else warm_up)
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=iters, val_interval=iters
    )
    if by_epoch:
        sampler = cfg.train_dataloader.get('sampler') or {}
        if class_name(sampler.get('type')) == 'DefaultSampler':
            cfg.train_dataloader.sampler = dict(
                type='InfiniteSampler', shuffle=sampler.get('shuffle', True)
            )
        cfg.log_processor = dict(
            cfg.get('log_processor') or {}, by_epoch=False
        )
    hooks = cfg.get('default_hooks') or {}
    checkpoint = hooks.get('checkpoint') or dict(type='CheckpointHook')
    interval = counts * max(steps // 4, 1)
    checkpoint = dict(checkpoint, by_epoch=False, interval=interval)
    cfg.default_hooks = dict(hooks, checkpoint=checkpoint)


def _schedulers(cfg: Config) -> Iterator[dict]:
    found = cfg.get('param_scheduler') or []
    if isinstance(found, dict) and 'type' not in found:  # several optimizers
        found = sum(map(_listed, found.values()), [])
    yield from _listed(found)


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _scale(cfg: dict, names, scaled: Callable[[float], int]) -> None:
    """Scale those counts that are there, and no sign such as -1."""

    def apply(value):
        if isinstance(value, (list, tuple)):
            return type(value)(apply(v) for v in value)
        known = isinstance(value, (int, float)) and math.isfinite(value)
        return scaled(value) if known and value > 0 else value

    for name in names:
        if name in cfg:
            cfg[name] = apply(cfg[name])
