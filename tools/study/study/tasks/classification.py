"""A small ResNet of MMPretrain on digit scenes of 16x16."""

import math
from contextlib import nullcontext
from typing import Callable, List, Optional

import mmpretrain.models  # noqa: F401  registers them
import torch
from mmengine.logging import MMLogger
from mmpretrain.registry import MODELS
from torch import nn
from torch.nn.utils import clip_grad_norm_

from wsbcn_mm.engine.hooks import NormalizationMonitor

from ..methods import method_cfg
from ..micro_batches import normalize_in_micro_batches
from ..scenes import scenes
from ..scheduled_rates import ScheduledRates

DEFAULTS = dict(
    batch_size=32,
    steps=500,
    warmup=20,
    num_groups=8,
    update_rate=None,
    annealing=True,
    scheduled=False,
    channel_affine='group',
    grad_averaging=None,
    weight_decay=1e-4,
    clip_grad=None,
    variation=1.0,
    width=16,
    zero_init=False,
    evaluated=4000,
    monitor=0,
)


def build_model(settings: dict) -> nn.Module:
    """An ImageClassifier: ResNet of three stages of two blocks each."""
    norm_cfg, conv_cfg = method_cfg(
        settings['method'],
        images=settings['images'],
        batch_size=settings['batch_size'],
        num_groups=settings['num_groups'],
        update_rate=settings['update_rate'],
        channel_affine=settings['channel_affine'],
        grad_averaging=settings['grad_averaging'],
        momentum_annealing=settings['annealing'],
    )
    if settings.get('average'):  # the cumulative average of all forwards
        norm_cfg['momentum'] = None
    width = settings['width']
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='ResNet_CIFAR',
                depth=18,
                num_stages=3,
                strides=(1, 2, 2),
                dilations=(1, 1, 1),
                out_indices=(2,),
                zero_init_residual=settings['zero_init'],
                stem_channels=width,
                base_channels=width,
                norm_cfg=norm_cfg,
                conv_cfg=conv_cfg,
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead', num_classes=10, in_channels=4 * width
            ),
        )
    )
    MMLogger.get_current_instance().setLevel('WARNING')
    model.init_weights()
    return model


def schedule(step: int, settings: dict) -> float:
    """A linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / settings['warmup'])
    return warmup * 0.5 * (1 + math.cos(math.pi * step / settings['steps']))


def training_data(settings: dict, device: torch.device):
    """Batches of one pass over as many new scenes as steps ask for."""
    images, labels = scenes(
        'train',
        settings['steps'] * settings['batch_size'],
        seed=1 + settings['seed'],
        variation=settings['variation'],
    )
    size = settings['batch_size']
    return zip(images.to(device).split(size), labels.to(device).split(size))


def loss_of(model: nn.Module, images, labels):
    """The classifier's own loss, without a data sample for each image."""
    return model.head.loss_module(
        model.head(model.extract_feat(images)), labels
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, images, labels, own_statistics: Optional[int] = None
) -> dict:
    """Return the accuracy in percent, and the loss.

    Args:
        model (nn.Module): The classifier, put into evaluation mode.
        images, labels (Tensor): The scenes.
        own_statistics (int | None): Let BN normalize so many test images at
            a time with their own statistics, as it does in training, instead
            of its running averages. The averages move. Default: None
    """
    model.eval()
    size = 500
    if own_statistics:
        size -= size % own_statistics  # whole micro-batches
        for norm in _batch_norms(model):
            norm.train()
    scores = torch.cat(
        [model.head(model.extract_feat(x)) for x in images.split(size)]
    )
    right = scores.argmax(1) == labels
    return dict(
        accuracy=100 * float(right.float().mean()),
        test_loss=float(nn.functional.cross_entropy(scores, labels)),
    )


def _batch_norms(model: nn.Module) -> List[nn.Module]:
    return [m for m in model.modules() if type(m) is nn.BatchNorm2d]


@torch.no_grad()
def precise_statistics(model: nn.Module, settings: dict, device) -> None:
    """Give BN population statistics, measured over 2,000 training scenes.

    They tell whether running averages fail because they are noisy.
    """
    for norm in _batch_norms(model):
        norm.reset_running_stats()
        norm.momentum = None
        norm.__dict__.pop('forward', None)  # of a large batch, as it comes
    images, _ = scenes('train', 2000, seed=0, variation=settings['variation'])
    model.train()
    for part in images.to(device).split(500):
        model.extract_feat(part)


def _summary(monitor: NormalizationMonitor) -> dict:
    """Means over layers, and the worst layer's share of silent channels."""
    reports = monitor.reports().values()
    monitor.reset()
    off = [r.off for r in reports if r.off is not None]
    distance = [r.distance for r in reports if r.distance is not None]
    silent = [r.silent for r in reports if r.silent is not None]
    return dict(
        off=sum(off) / len(off),
        distance=sum(distance) / len(distance),
        silent=max(silent),
    )


def run(settings: dict, on_step: Optional[Callable] = None) -> dict:
    """Train and evaluate.

    Args:
        settings (dict): ``method``, ``images``, ``lr``, ``seed``, ``split``
            and what differs from ``DEFAULTS``.
        on_step (Callable | None): Called as ``on_step(step, model, images,
            labels)`` before each step, which it must leave as it was.
    """
    settings = {**DEFAULTS, **settings}
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(settings['seed'])
    model = build_model(settings).to(device)
    normalize_in_micro_batches(model, settings['images'])
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings['lr'],
        momentum=0.9,
        weight_decay=settings['weight_decay'],
    )
    rates = ScheduledRates(model) if settings['scheduled'] else None
    model.train()
    monitor, seen = NormalizationMonitor(model), []
    losses = []
    for step, (images, labels) in enumerate(training_data(settings, device)):
        share = schedule(step, settings)
        for group in optimizer.param_groups:
            group['lr'] = settings['lr'] * share
        if rates is not None:
            rates.set(share)
        if on_step is not None:
            on_step(step, model, images, labels)
        watched = settings['monitor'] and step % settings['monitor'] == 0
        with monitor.watching() if watched else nullcontext():
            loss = loss_of(model, images, labels)
        if watched:
            seen.append(dict(step=step, **_summary(monitor)))
        optimizer.zero_grad()
        loss.backward()
        if settings['clip_grad'] is not None:
            clip_grad_norm_(model.parameters(), settings['clip_grad'])
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    test = scenes(
        settings['split'],
        settings['evaluated'],
        seed=dict(val=10**6, test=10**6 + 1)[settings['split']],
        variation=settings['variation'],
    )
    test = [t.to(device) for t in test]
    result = evaluate(model, *test)
    if settings['split'] == 'test' and _batch_norms(model):
        own = evaluate(model, *test, own_statistics=settings['images'])
        result['accuracy_own'] = own['accuracy']
        precise_statistics(model, settings, device)
        result['accuracy_precise'] = evaluate(model, *test)['accuracy']
    # Means over tenths of the training.
    result['loss'] = [float(part.mean()) for part in losses.chunk(10)]
    if seen:
        result['curves'] = seen
    return result
