import logging

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm import BCN, SyncBCN

SCHEDULERS = [
    dict(type='LinearLR', start_factor=0.25, begin=0, end=3, by_epoch=False),
    dict(type='MultiStepLR', milestones=[5], end=6, by_epoch=False),
]
# Of the highest learning rate, in each of six iterations.
SHARES = [0.25, 0.625, 1, 1, 1, 0.1]


class Model(BaseModel):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), *layers)

    def forward(self, inputs, mode='tensor'):
        y = self.layers(torch.stack(inputs))
        return dict(loss=y.square().mean()) if mode == 'loss' else y


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return dict(inputs=torch.rand(3, 5, 5))


class Watch(Hook):
    priority = 'VERY_LOW'

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        norms = [m for m in runner.model.modules() if isinstance(m, BCN)]
        self.seen.append([norm.momentum for norm in norms])


def train(work_dir, *layers, iters=6, schedulers=SCHEDULERS, **kwargs):
    watch = Watch()
    runner = Runner(
        model=Model(*layers),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Images(),
            batch_size=1,
            num_workers=0,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02)),
        param_scheduler=schedulers,
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)
        ),
        custom_hooks=[dict(type='UpdateRateHook'), watch],
        experiment_name=f'{work_dir.name}-{iters}',
        default_scope='mmengine',
        **kwargs,
    )
    runner.train()
    return watch.seen, runner


def test_the_rate_follows_warm_up_and_decay(tmp_path):
    layers = (
        BCN(8, 2, momentum=0.5),
        SyncBCN(8, 2, momentum=0.25),
        BCN(8, 2, momentum=0.1, estimate=False),
        BCN(8, 2, momentum=None),
    )
    seen, runner = train(tmp_path, *layers)
    fast, slow, batch, average = zip(*seen)
    assert fast == pytest.approx([0.5 * share for share in SHARES])
    assert slow == pytest.approx([0.25 * share for share in SHARES])
    assert set(batch) == {0.1} and set(average) == {None}
    # As it was, for whatever is done with the model then.
    assert [m.momentum for m in layers] == [0.5, 0.25, 0.1, None]


def test_estimates_move_by_it(tmp_path):
    norm = BCN(8, 2, momentum=0.5)
    before = torch.zeros(8)
    moved = []

    def watch(module, inputs, output):
        target = inputs[0].detach().mean((0, 2, 3))
        moved.append((module.running_mean - before) / (target - before))
        before.copy_(module.running_mean)

    norm.register_forward_hook(watch)
    train(tmp_path, norm)
    assert len(moved) == len(SHARES)
    for ratio, share in zip(moved, SHARES):
        torch.testing.assert_close(
            ratio, torch.full((8,), 0.5 * share), rtol=1e-3, atol=1e-4
        )


def test_a_resumed_training_goes_on_with_it(tmp_path):
    train(tmp_path, BCN(8, 2, momentum=0.5), iters=3)
    seen, _ = train(tmp_path, BCN(8, 2, momentum=0.5), resume=True)
    assert [r for (r,) in seen] == pytest.approx([0.5, 0.5, 0.05])


def test_without_a_schedule_it_is_the_layers(tmp_path):
    seen, _ = train(tmp_path, BCN(8, 2, momentum=0.5), schedulers=None)
    assert [r for (r,) in seen] == [0.5] * 6


def test_a_model_without_estimates_is_told(tmp_path):
    _, runner = train(tmp_path, nn.GroupNorm(2, 8), log_level=logging.INFO)
    with open(f'{runner.log_dir}/{runner.timestamp}.log') as file:
        assert 'no BCN with estimate=True' in file.read()
