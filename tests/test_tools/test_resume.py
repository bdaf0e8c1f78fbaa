"""Killed and resumed training against training that never was."""

import signal
import subprocess
import sys

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader

import wsbcn_mm  # noqa: F401  checkpoints of MMEngine can be loaded

SCRIPT = '''
import os
import random
import signal
import sys

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn

import wsbcn_mm

torch.set_num_threads(1)
work_dir, by_epoch, kill_at, exact = sys.argv[1:]
by_epoch, kill_at = by_epoch == 'epoch', int(kill_at)


@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    """Draws from all three generators, as augmentations do."""

    metainfo = {}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.rand(3, 8, 8, generator=generator)
        if np.random.rand() < 0.5:
            x = x.flip(1)
        x = x * random.random() + 0.1 * torch.randn(3, 8, 8)
        return dict(inputs=x, label=index % 4)


@MODELS.register_module()
class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            wsbcn_mm.ConvWS(3, 8, 3),
            wsbcn_mm.BCN(8, 4),
            nn.ReLU(),
            wsbcn_mm.CenConv(8, 8, 3),
            wsbcn_mm.MABN(8, 2, 8, warmup_iters=2),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(128, 4),
        )

    def forward(self, inputs, label, mode='tensor'):
        y = self.net(torch.stack(inputs))
        return dict(loss=nn.functional.cross_entropy(y, torch.tensor(label)))


@HOOKS.register_module()
class Kill(Hook):
    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


hooks = [dict(type='Kill'), dict(type='EMAHook', momentum=0.1)]
if exact == 'exact':
    hooks.append(dict(type='ExactResumeHook'))
loop = dict(max_epochs=4) if by_epoch else dict(max_iters=16)
runner = Runner.from_cfg(dict(
    model=dict(type='Tiny'),
    work_dir=work_dir,
    train_dataloader=dict(
        dataset=dict(type='Images'),
        sampler=dict(
            type='DefaultSampler' if by_epoch else 'InfiniteSampler',
            shuffle=True,
        ),
        batch_size=2,
        num_workers=2 if by_epoch else 0,
        collate_fn=dict(type='pseudo_collate'),
    ),
    train_cfg=dict(by_epoch=by_epoch, **loop),
    optim_wrapper=dict(
        optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-3)
    ),
    param_scheduler=[
        dict(type='PolyLR', by_epoch=False, power=0.9, end=16)
    ],
    custom_hooks=hooks,
    default_hooks=dict(checkpoint=dict(
        type='CheckpointHook',
        by_epoch=by_epoch,
        interval=2 if by_epoch else 8,
    )),
    randomness=dict(seed=3),
    default_scope='mmengine',
    resume=kill_at < 0,
    experiment_name=f'run{kill_at}',
))
runner.train()
'''


def start(script, work_dir, by_epoch, kill_at, exact='exact'):
    return subprocess.Popen(
        [sys.executable, script, work_dir, by_epoch, str(kill_at), exact],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def train_twice(tmp_path, by_epoch, exact):
    """The last checkpoints of an unbroken and of a broken training."""
    script = tmp_path / 'train.py'
    script.write_text(SCRIPT)
    folders = tmp_path / 'whole', tmp_path / 'broken'
    whole = start(script, folders[0], by_epoch, 10**6, exact)
    finish(start(script, folders[1], by_epoch, 11, exact), -signal.SIGKILL)
    resumed = finish(start(script, folders[1], by_epoch, -1, exact))
    assert 'resumed' in resumed
    finish(whole)
    name = 'epoch_4.pth' if by_epoch == 'epoch' else 'iter_16.pth'
    return [
        CheckpointLoader.load_checkpoint(str(folder / name), 'cpu')
        for folder in folders
    ]


def differences(a, b, path=''):
    """Where two checkpoints differ in a bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        pairs = [(k, a[k], b[k]) for k in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b))]
    else:
        return [] if a == b else [path]
    return [d for k, x, y in pairs for d in differences(x, y, f'{path}/{k}')]


@pytest.mark.slow
@pytest.mark.parametrize('by_epoch', ['iter', 'epoch'])
def test_resumed_training_is_the_same(tmp_path, by_epoch):
    a, b = train_twice(tmp_path, by_epoch, 'exact')
    assert any('buffer_gz' in key for key in a['state_dict'])
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert a[part]
        assert differences(a[part], b[part]) == []
    assert a['param_schedulers'] == b['param_schedulers']


@pytest.mark.slow
def test_without_the_hook_it_is_not(tmp_path):
    """Else the test above would show nothing."""
    a, b = train_twice(tmp_path, 'iter', 'inexact')
    assert differences(a['state_dict'], b['state_dict'])
