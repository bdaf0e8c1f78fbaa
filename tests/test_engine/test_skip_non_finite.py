import math
from unittest import mock

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm import BCN, ConvWS
from wsbcn_mm.engine import SkipNonFiniteHook
from wsbcn_mm.engine.errors import UsageError

NAN = math.nan


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(ConvWS(1, 4, 3), BCN(4, 2))

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.layers(torch.stack(inputs)).square().mean())


def train(tmp_path, values, **hook):
    """Train on an image of each value; the runner and what it warned of."""
    images = [torch.rand(1, 5, 5) * value for value in values]
    runner = Runner(
        Model(),
        str(tmp_path),
        train_dataloader=dict(
            dataset=[dict(inputs=image) for image in images],
            batch_size=1,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        custom_hooks=[dict(type='SkipNonFiniteHook', **hook)],
        experiment_name=tmp_path.name,
        default_scope='mmengine',
    )
    told = []
    with (
        mock.patch.object(
            runner.logger, 'log', lambda level, text: told.append(text)
        ),
        mock.patch.object(runner.logger, 'warning', told.append),
    ):
        runner.train()
    return runner, [t for t in told if 'SkipNonFiniteHook' in t]


def finite(model) -> bool:
    return all(v.isfinite().all() for v in model.state_dict().values())


def test_the_run_recovers_and_it_is_said_once(tmp_path):
    runner, told = train(tmp_path, [1, NAN, 1, NAN, math.inf, 1])
    assert finite(runner.model)
    assert len(told) == 2
    assert 'iteration 2' in told[0] and 'step was skipped' in told[0]
    assert '3 iterations' in told[1]
    optimizer = runner.optim_wrapper.optimizer
    steps = {int(s['step']) for s in optimizer.state.values()}
    assert steps == {3}


def test_nothing_changes_where_all_is_finite(tmp_path):
    runner, told = train(tmp_path, [1, 2, 3])
    assert not told
    steps = runner.optim_wrapper.optimizer.state.values()
    assert {int(s['step']) for s in steps} == {3}


def test_divergence_ends(tmp_path):
    with pytest.raises(UsageError, match='the last 2 iterations gave a loss'):
        train(tmp_path, [1, NAN, NAN, NAN], max_in_a_row=2)
    train(tmp_path, [1, NAN, 1, NAN], max_in_a_row=2)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_large_gradients_are_finite(dtype):
    """Their sum is not."""
    weight = nn.Parameter(torch.zeros(100, dtype=dtype))
    weight.grad = torch.full_like(weight, torch.finfo(dtype).max)
    hook, optimizer = SkipNonFiniteHook(), torch.optim.SGD([weight], lr=0.1)
    hook._before_step(optimizer, (), {})
    assert weight.grad is not None
    weight.grad[3] = NAN
    hook._before_step(optimizer, (), {})
    assert weight.grad is None


def test_bad_arguments():
    with pytest.raises(ValueError, match='max_in_a_row'):
        SkipNonFiniteHook(0)
