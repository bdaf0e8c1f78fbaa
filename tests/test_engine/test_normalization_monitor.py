import json
import logging
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

import wsbcn_mm  # noqa: F401
from wsbcn_mm.engine.hooks import (
    NormalizationMonitor,
    NormalizationMonitorHook,
)


def report_of(norm, x, relu=True):
    model = nn.Sequential(norm, nn.ReLU(inplace=True) if relu else nn.Tanh())
    monitor = NormalizationMonitor(model)
    with monitor.watching():
        model(x)
    return monitor.reports()['0']


def test_off_is_the_share_that_relu_turns_off():
    norm = nn.BatchNorm2d(8)
    nn.init.constant_(norm.bias[:2], -10)
    x = torch.randn(4, 8, 6, 6)
    assert report_of(norm, x).off == 0.25
    assert report_of(norm, x, relu=False).off is None


def test_off_survives_an_inplace_relu_and_is_not_a_mean_below_zero():
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.bias, -1.0)  # a sixth of the values pass
    assert report_of(norm, torch.randn(4, 4, 16, 16)).off == 0


@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),
        wsbcn_mm.BCN(8, num_groups=2),
        wsbcn_mm.BCN(8, num_groups=2, channel_affine='channel'),
        nn.InstanceNorm2d(8),
        nn.GroupNorm(2, 8, affine=False),
    ],
    ids=lambda norm: repr(norm)[:30],
)
def test_distance_from_batch_normalization(norm):
    x = torch.randn(4, 8, 6, 6) * torch.arange(1, 9).view(8, 1, 1)
    x = x + torch.arange(8).view(8, 1, 1)
    plain = norm(x)  # unit scales, zero shifts
    var, mean = torch.var_mean(plain, (0, 2, 3), correction=0)
    expected = (mean.square() + (var.sqrt() - 1).square()).sqrt().mean()
    # The output affine is not what is measured.
    weight = getattr(norm, 'weight', None)
    if weight is not None:
        with torch.no_grad():
            weight.mul_(torch.linspace(-3, 2, len(weight)))
            norm.bias.add_(torch.linspace(1, 4, len(weight)))
    if isinstance(norm, wsbcn_mm.BCN):
        norm.momentum = 0.0
    got = report_of(norm, x)
    assert got.distance == pytest.approx(float(expected), abs=2e-3)
    if type(norm) is nn.BatchNorm2d:
        assert got.distance < 1e-3


def test_sums_over_calls_are_those_of_all_values():
    norm = nn.GroupNorm(1, 4, affine=False)
    model = nn.Sequential(norm)
    parts = [torch.randn(1, 4, size, size) for size in (3, 9, 27)]
    for i, part in enumerate(parts):
        part[:, i] += 5
    monitor = NormalizationMonitor(model)
    with monitor.watching():
        for part in parts:
            model(part)
        model(torch.zeros(0, 4, 3, 3))  # no proposals: nothing to see
    values = torch.cat([norm(p).flatten(2) for p in parts], 2)
    var, mean = torch.var_mean(values, (0, 2), correction=0)
    expected = torch.hypot(mean, var.sqrt() - 1).mean()
    assert monitor.reports()['0'].distance == pytest.approx(
        float(expected), abs=1e-5
    )


def test_a_zero_initialized_scale_is_not_taken_for_a_failure():
    norm = nn.BatchNorm2d(4)
    nn.init.zeros_(norm.weight)
    report = report_of(norm, torch.randn(2, 4, 5, 5))
    assert report.silent is None and report.distance is None


def test_constant_channels_are_silent():
    # What one image under GN may come to: the spread of a group is between
    # its channels, none of which varies over positions.
    x = torch.arange(8.0).view(8, 1, 1) * 100 + torch.randn(1, 8, 6, 6)
    report = report_of(nn.GroupNorm(1, 8), x)
    assert report.silent == 1.0
    assert report_of(nn.BatchNorm2d(8), x).silent == 0.0


def test_activation_checkpointing_is_seen_once():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.ReLU())
    monitor = NormalizationMonitor(model)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with monitor.watching():
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert monitor._layers['0'].count == 2 * 25


def test_no_hook_stays_on_the_model():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    monitor = NormalizationMonitor(model)
    with pytest.raises(RuntimeError), monitor.watching():
        model(torch.randn(2, 3, 5, 5))
    for module in model:
        assert not module._forward_hooks and not module._forward_pre_hooks


class Images(Dataset):
    metainfo = {}

    def __len__(self):
        return 40

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 8, 8, generator=generator))


class Model(BaseModel):
    def __init__(self, shift=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.relu = nn.ReLU(inplace=True)
        nn.init.constant_(self.norm.bias, shift)
        self.hooked = []

    def forward(self, inputs, mode='tensor'):
        self.hooked.append(bool(self.norm._forward_hooks))
        y = self.relu(self.norm(self.conv(torch.stack(inputs))))
        return dict(loss=y.square().mean()) if mode == 'loss' else y


def train(tmp_path, model, cfg=None, **hook):
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            dataset=Images(),
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=20),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.001)),
        custom_hooks=[dict(type='NormalizationMonitorHook', **hook)],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=5), checkpoint=None
        ),
        visualizer=dict(
            type='Visualizer',
            vis_backends=[
                dict(type='LocalVisBackend'),
                dict(type='TensorboardVisBackend'),
            ],
        ),
        experiment_name=tmp_path.name,
        cfg=cfg,
    )
    messages = []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    runner.logger.addHandler(Handler())
    runner.train()
    return runner, messages


def scalars(tmp_path):
    path = next(Path(tmp_path).rglob('scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hook_logs_to_the_backends_and_the_log(tmp_path):
    model = Model()
    runner, messages = train(tmp_path, model, interval=10, num_images=6)
    # Three iterations of two images, from iteration 0 and from 10.
    assert model.hooked == [True] * 3 + [False] * 7 + [True] * 3 + [False] * 7
    lines = [s for s in scalars(tmp_path) if 'normalization/norm/off' in s]
    assert [line['step'] for line in lines] == [3, 13]
    assert all(0 <= line['normalization/norm/off'] <= 1 for line in lines)
    assert all(line['normalization/norm/distance'] > 0 for line in lines)
    assert any('norm_off' in m and 'norm_distance' in m for m in messages)
    assert not any('depends' in m for m in messages)
    assert list(Path(tmp_path).rglob('events.out.tfevents*'))


def test_hook_says_when_nothing_depends_on_the_input(tmp_path):
    _, messages = train(tmp_path, Model(shift=-20.0), interval=5, num_images=2)
    warnings = [m for m in messages if 'hardly depends on the input' in m]
    assert len(warnings) == 1
    assert 'norm (100%)' in warnings[0] and 'BCN' in warnings[0]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(interval=0), 'interval must be a positive integer, got 0'),
        (dict(num_images=-1), 'num_images must be a positive integer'),
        (dict(warn_above=2), r'warn_above must be in \[0, 1\], got 2'),
    ],
)
def test_hook_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormalizationMonitorHook(**arguments)


@pytest.mark.skipif(
    not hasattr(torch.compiler, 'set_stance'), reason='needs torch 2.6'
)
def test_hook_sees_a_compiled_model(tmp_path):
    model = Model()
    _, messages = train(
        tmp_path,
        model,
        cfg=dict(compile=dict(backend='eager')),
        interval=10,
        num_images=6,
    )
    logged = [line for line in scalars(tmp_path) if 'norm_off' in line]
    assert logged
    assert not any('saw no normalization' in m for m in messages)
    assert any('compiled' in m for m in messages)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda m: torch.compile(m, backend='eager'),
        lambda m: nn.Sequential(m[0], checkpoint_wrapper(m[1]), m[2]),
    ],
    ids=['compiled', 'checkpointed'],
)
def test_names_are_those_of_the_model_itself(wrap):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    wrapped = wrap(model)
    x = torch.randn(2, 3, 8, 8)
    wrapped(x)  # compiled before anyone watches
    monitor = NormalizationMonitor(wrapped)
    with monitor.watching():
        wrapped(x)
    assert list(monitor.reports()) == ['1']
    wrapped(x)
    assert monitor._layers['1'].count == 2 * 36


def test_hook_says_that_it_saw_nothing(tmp_path):
    class Bypass(Model):
        def forward(self, inputs, mode='tensor'):
            loss = self.conv(torch.stack(inputs)).square().mean()
            return dict(loss=loss)

    _, messages = train(tmp_path, Bypass(), interval=5, num_images=2)
    told = [m for m in messages if 'saw no normalization' in m]
    assert len(told) == 1 and 'in 1 layers' in told[0]
