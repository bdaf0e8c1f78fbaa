import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm import BCN, ConvWS
from wsbcn_mm.engine import CalibrateEstimatesHook, calibrate


def network(norm, dropout=0.0):
    layers = []
    for channels in (3, 16, 16):
        layers += [ConvWS(channels, 16, 3), norm(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(dropout))


def from_gn(momentum=0.1):
    source = network(lambda c: nn.GroupNorm(4, c))
    for p in source.parameters():
        nn.init.normal_(p, 0.5)
    net = network(
        lambda c: BCN(c, 4, momentum=momentum, channel_affine='channel')
    )
    net.load_state_dict(source.state_dict())
    return net


def images(count=8):
    return [torch.rand(1, 3, 16, 16) * 3 + i for i in range(count)]


def outputs(net, batches):
    mode = net.training
    net.eval()
    with torch.no_grad():
        result = torch.cat([net(x) for x in batches])
    net.train(mode)
    return result


def train_forwards(net, batches, steps=100):
    net.train()
    with torch.no_grad():
        for i in range(steps):
            net(batches[i % len(batches)])


def change(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_the_function_stays_and_goes_on_staying():
    batches = images()
    net = from_gn()
    plain = copy.deepcopy(net)
    before = outputs(net, batches)
    names = calibrate(net, batches)
    assert names == ['1', '4', '7']
    assert change(outputs(net, batches), before) < 1e-5
    train_forwards(net, batches)
    calibrated = change(outputs(net, batches), before)
    train_forwards(plain, batches)
    uncalibrated = change(outputs(plain, batches), before)
    assert uncalibrated > 0.3 and calibrated < uncalibrated / 5


def test_one_pass_measures_what_training_converges_to():
    x = torch.randn(64, 3, 16, 16)
    net = from_gn()
    calibrate(net.train(), [x])
    measured = [net[i].running_mean.clone() for i in (1, 4, 7)]
    for i in (1, 4, 7):
        net[i].momentum = 0.9999
    net(x)
    for i, mean in zip((1, 4, 7), measured):
        assert torch.allclose(net[i].running_mean, mean, atol=1e-3)


def test_nothing_else_is_updated():
    net = nn.Sequential(nn.BatchNorm2d(3), from_gn())
    before = copy.deepcopy(net.state_dict())
    net.train()
    modes = [m.training for m in net.modules()]
    calibrate(net, images(2))
    assert modes == [m.training for m in net.modules()]
    for key in ('0.running_mean', '0.num_batches_tracked', '1.1.weight'):
        assert torch.equal(net.state_dict()[key], before[key])
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize('checkpoint', ['BN', 'none'])
def test_what_is_no_identity_is_left_alone(checkpoint):
    net = network(lambda c: BCN(c, 4))
    if checkpoint == 'BN':
        source = network(nn.BatchNorm2d)
        source(torch.rand(4, 3, 16, 16))
        net.load_state_dict(source.state_dict())
    before = copy.deepcopy(net.state_dict())
    assert calibrate(net, images(2)) == []
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_layer_that_sees_nothing_good_is_left_alone():
    net = from_gn()
    assert calibrate(net, []) == []
    assert calibrate(net, [torch.full((1, 3, 16, 16), float('inf'))]) == []
    assert calibrate(net, [torch.rand(0, 3, 16, 16)]) == []
    assert net[1].running_mean.eq(0).all()


def _calibrate_a_share():
    torch.manual_seed(0)
    net = from_gn()
    rank = torch.distributed.get_rank()
    calibrate(net, images()[rank * 5 : rank * 5 + 5])  # 5 images and 3
    return [net[i].running_var for i in (1, 4, 7)]


def test_all_processes_get_the_same(processes):
    a, b = processes.run(_calibrate_a_share)
    torch.manual_seed(0)
    net = from_gn()
    calibrate(net, images())
    for left, right, i in zip(a, b, (1, 4, 7)):
        assert torch.equal(left, right)
        assert torch.allclose(left, net[i].running_var)


class Model(BaseModel):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs, mode='tensor'):
        inputs = torch.stack(inputs)
        return {'loss': self.net(inputs).mean()}


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.rand(3, 16, 16, generator=generator) + index)


def run(
    tmp_path, hook=True, resume=False, max_iters=2, net=None, num_images=12
):
    torch.manual_seed(0)
    net = net or from_gn(momentum=0.0)
    if resume:
        net[1].batch_weight.data.fill_(1)
    cfg = dict(type='CalibrateEstimatesHook', num_images=num_images)
    runner = Runner(
        Model(net),
        str(tmp_path),
        train_dataloader=dict(
            dataset=Images(),
            sampler=dict(type='InfiniteSampler'),
            batch_size=2,
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
        custom_hooks=[cfg] if hook else [],
        randomness=dict(seed=0),
        resume=resume,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2)),
        experiment_name=f'{tmp_path.name}{hook}{resume}{max_iters}',
    )
    runner.train()
    return net, torch.rand(1)


def test_hook(tmp_path):
    net, after = run(tmp_path / 'with')
    assert (net[1].batch_weight - 1).abs().max() > 0.1
    # The training's random numbers are not touched.
    assert torch.equal(after, run(tmp_path / 'without', hook=False)[1])


@pytest.mark.parametrize('num_images', [8, 12, 64])
def test_hook_says_how_many_images_it_saw(tmp_path, num_images, monkeypatch):
    """The set has 12."""
    told, seen = [], []

    def info(logger, message, *args):
        if 'layers got estimates' in str(message):
            told.append((message, sum(seen)))

    monkeypatch.setattr(logging.Logger, 'info', info)
    net = from_gn(momentum=0.0)
    net[1].register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    run(tmp_path, net=net, num_images=num_images)
    ((line, count),) = told
    assert count == min(num_images, 12)
    assert f'from {count} images' in line
    assert ('all that there are' in line) == (num_images > 12)


def test_hook_needs_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Images())

    runner = SimpleNamespace(
        model=nn.Module(),
        train_dataloader=torch.utils.data.DataLoader(Stream()),
        iter=0,
        _resume=False,
    )
    with pytest.raises(TypeError, match='Stream has no length.*calibrate'):
        CalibrateEstimatesHook().before_train(runner)


def test_hook_does_nothing_on_resume(tmp_path):
    run(tmp_path, hook=False)
    net, _ = run(tmp_path, resume=True, max_iters=4)
    assert net[1].batch_weight.eq(1).all()


def test_hook_needs_images():
    from wsbcn_mm.engine import CalibrateEstimatesHook

    with pytest.raises(ValueError, match='num_images'):
        CalibrateEstimatesHook(num_images=0)
