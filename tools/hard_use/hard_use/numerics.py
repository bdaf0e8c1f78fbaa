"""Overflows, NaN batches and long runs: estimates and weights stay finite."""

import copy
import gc
import itertools
import math
import os
import re
from typing import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BCN, BGN, MABN, CenConv, ConvWS, SyncBCN

from .bench import Bench, attack, weights

GROUP = 'Numbers'
STEPS = 12
BAD_STEPS = {3: math.nan, 6: 1e30}
NORMS = {
    'BCN': lambda width: BCN(width, 4, momentum=0.1),
    'BCN, estimate=False': lambda width: BCN(width, 4, 1e-5, 0.1, False),
    'SyncBCN': lambda width: SyncBCN(width, 4, momentum=0.1),
    'BGN': lambda width: BGN(width, 4),
    'MABN': lambda width: MABN(width, 2, 8, warmup_iters=2),
}
PRECISIONS = {
    'float32': None,
    'bfloat16': torch.bfloat16,
    'float16 with a GradScaler': torch.float16,
}


class Network(nn.Module):
    """A few layers, some of them checkpointed or frozen."""

    def __init__(self, norm: Callable, mode: str):
        super().__init__()
        conv = CenConv if norm is NORMS['MABN'] else ConvWS
        widths = (3, 8, 16, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(a, b, 3, padding=1), norm(b), nn.ReLU())
            for a, b in zip(widths, widths[1:])
        )
        self.head = nn.Linear(16, 4)
        self.mode = mode
        if mode == 'frozen stages':
            self.stages[0].requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.mode == 'frozen stages':
            self.stages[0].eval()
        return self

    def forward(self, x):
        for i, stage in enumerate(self.stages):
            if self.mode.startswith('checkpointed') and i:
                reentrant = self.mode == 'checkpointed, reentrant'
                x = checkpoint(stage, x, use_reentrant=reentrant)
            else:
                x = stage(x)
        return self.head(x.mean((2, 3)))


MODES = [
    'plain',
    'accumulated',
    'checkpointed, reentrant',
    'checkpointed, not reentrant',
    'EMA',
    'frozen stages',
]


def train(norm: Callable, dtype, mode: str):
    """Some steps: one has an image with a NaN, one with what overflows.

    Returns:
        tuple: The network, its average, and the losses.
    """
    torch.manual_seed(0)
    model = Network(norm, mode).train()
    average = copy.deepcopy(model) if mode == 'EMA' else None
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05
    )
    half = dtype is torch.float16
    # So large that the first gradients overflow.
    scaler = torch.amp.GradScaler('cpu', 2.0**40, enabled=half)
    losses, every = [], 2 if mode == 'accumulated' else 1
    x = torch.randn(2, 3, 8, 8)
    target = torch.tensor([0, 1])
    for step in range(STEPS * every * (3 if half else 1)):
        images = x.clone()
        if step in BAD_STEPS:
            images[0, 0, 0, 0] = BAD_STEPS[step]
        with torch.autocast('cpu', dtype, enabled=dtype is not None):
            output = model(images)
        loss = nn.functional.cross_entropy(output.float(), target) / every
        scaler.scale(loss).backward()
        losses.append(loss.item() * every)
        if (step + 1) % every:
            continue
        finite = all(
            p.grad.isfinite().all()
            for p in model.parameters()
            if p.grad is not None
        )
        if half or finite:  # as SkipNonFiniteHook does
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 10)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if average is not None:
            for kept, new in zip(
                average.state_dict().values(), model.state_dict().values()
            ):
                if kept.is_floating_point():
                    kept.lerp_(new, 0.1)
    return model, average, losses


@attack(
    GROUP,
    'a NaN or an overflow in one batch, in every way to train',
    slow=True,
)
def bad_batches(bench: Bench) -> None:
    for (name, norm), (precision, dtype), mode in itertools.product(
        NORMS.items(), PRECISIONS.items(), MODES
    ):
        with bench.survives(f'{name}, {precision}, {mode}'):
            model, average, losses = train(norm, dtype, mode)
            for network in filter(None, (model, average)):
                for key, value in network.state_dict().items():
                    assert value.isfinite().all(), f'{key} is not finite'
                network.eval()
                assert network(torch.randn(1, 3, 9, 9)).isfinite().all()
            assert math.isfinite(losses[-1]), 'the last loss is NaN'
            assert losses[-1] < losses[0], (
                f'it learns nothing: {losses[0]:.3f} -> {losses[-1]:.3f}'
            )


NAN_IMAGE = """
custom_imports = dict(imports=['wsbcn_mm', 'nan_image'])
train_cfg = dict(max_epochs=3)
log_processor = dict(window_size=1)  # no mean with those before
train_pipeline = list(_base_.train_pipeline)
train_pipeline.insert(-1, dict(type='NaNImage', times={times}))
train_dataloader['dataset'].update(pipeline=train_pipeline)
"""
TRANSFORM = """
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS


@TRANSFORMS.register_module()
class NaNImage(BaseTransform):
    def __init__(self, times):
        self.times, self.seen = times, 0

    def transform(self, results):
        self.seen += 1
        results['img'] = results['img'].astype('float32')
        if 2 <= self.seen < 2 + self.times:
            results['img'][:] = float('nan')
        return results
"""


@attack(GROUP, 'a NaN image in tools/train.py', slow=True)
def nan_image(bench: Bench) -> None:
    (bench.folder / 'nan_image.py').write_text(TRANSFORM)
    path = f'{bench.folder}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    for times in (1, 3):
        with bench.survives(f'{times} of 9 batches are NaN'):
            config = bench.config(NAN_IMAGE.format(times=times))
            work_dir = bench.folder / f'run_{times}'
            run = bench.train(config, work_dir, PYTHONPATH=path).succeeds()
            run.says('SkipNonFiniteHook: in iteration 2 .*leftImg8bit', 1)
            if times > 1:
                run.says('SkipNonFiniteHook: 3 iterations were not finite')
            for key, value in weights(work_dir / 'epoch_3.pth').items():
                assert value.isfinite().all(), f'{key} is not finite'
            losses = re.findall(r' loss: (\S+)', run.output)
            assert losses.count('nan') == times, f'the losses: {losses}'
            assert losses[-1] != 'nan', 'it did not recover'
    with bench.survives('all batches are NaN: ends and says so'):
        config = bench.config(
            NAN_IMAGE.format(times=10**6)
            + "hook = dict(type='SkipNonFiniteHook', max_in_a_row=5)\n"
            'custom_hooks = [hook]\n',
            'diverged.py',
        )
        bench.train(
            config, bench.folder / 'diverged', PYTHONPATH=path
        ).refuses('diverged', 'last 5 iterations', 'learning rate')


@attack(GROUP, '10,000 steps without growth of memory', slow=True)
def memory(bench: Bench) -> None:
    for name, norm in NORMS.items():
        steps = 10000 if name == 'BCN' else 1000 * bench.scale
        torch.manual_seed(0)
        conv = CenConv if name == 'MABN' else ConvWS
        model = nn.Sequential(conv(3, 8, 3), norm(8), nn.ReLU())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with bench.survives(f'{name}, {steps} steps'):
            sizes = []
            for step in range(steps):
                x = torch.randn(2, 3, 6 + step % 5, 7)
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step in (steps // 5, steps - 1):
                    sizes.append(_resident_bytes())
            grown = sizes[1] - sizes[0]
            bench.notes.append(
                f'{name}, {steps:,} steps: {grown / 2**20:+.1f} MiB'
            )
            assert grown < 4 * 2**20, f'{grown} bytes more'
            for key, value in model.state_dict().items():
                assert value.isfinite().all(), f'{key} is not finite'


def _resident_bytes() -> int:
    gc.collect()
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
