import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn

from wsbcn_mm import BCN, MABN


def train(model, images, scaler=None):
    """As mmengine does with dynamic loss scaling, or without."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrapper = SimpleNamespace()
    if scaler:
        wrapper.loss_scaler = scaler
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper)
    hook = HOOKS.build(dict(type='LossScaleHook'))
    for i, x in enumerate(images):
        hook.before_train_iter(runner, i)
        optimizer.zero_grad()
        loss = (model(x) - 1).square().sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return model.state_dict()


@pytest.mark.parametrize('grad_averaging', [4, 0.3])
def test_a_changing_scale_changes_nothing(grad_averaging):
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1),
        BCN(4, 2, grad_averaging=grad_averaging),
        MABN(4, 1, 4, warmup_iters=0),
    ).double()
    images = torch.randn(8, 1, 4, 5, 5).double()
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10, growth_interval=2)
    got = train(copy.deepcopy(model), images, scaler)
    assert scaler.get_scale() == 2.0**14
    for name, value in train(model, images).items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


def test_an_overflow_leaves_nothing_behind():
    """The scale is halved until nothing overflows."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), BCN(4, 2, grad_averaging=4))
    images = torch.randn(8, 1, 4, 5, 5)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**127)
    train(model, images, scaler)
    assert scaler.get_scale() < 2.0**126
    assert 0 < model[1].grad_images.max() < len(images)
    assert model[1].grad_statistics.isfinite().all()
    assert model[1].grad_statistics.abs().max() < 100
