import copy
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm import BCN, BGN, MABN, ConvWS, SyncBCN, SyncEstimatesHook
from wsbcn_mm.engine.hooks.sync_estimates_hook import average_estimates

IMAGES = 6


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def image(index):
    generator = torch.Generator().manual_seed(index)
    return torch.randn(4, 5, 5, generator=generator).double() + index


class Model(BaseModel):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers).double()

    def forward(self, inputs, mode='tensor'):
        y = self.layers(torch.stack(inputs))
        return dict(loss=(y - 1).square().mean()) if mode == 'loss' else y


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        return dict(inputs=image(index))


def train(model, work_dir, batch_size, lr, launcher, sync_bn, hooks):
    """Train with mmengine's Runner; the weights and estimates after it."""
    with mock.patch.dict(os.environ, LOCAL_RANK='0'):
        runner = Runner(
            model=model,
            work_dir=work_dir,
            train_dataloader=dict(
                dataset=Images(),
                batch_size=batch_size,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr)),
            custom_hooks=hooks,
            default_hooks=dict(checkpoint=None),
            launcher=launcher,
            log_level='ERROR',
            experiment_name=work_dir.replace(os.sep, '_'),
            default_scope='mmengine',
            cfg=Config(
                dict(
                    sync_bn=sync_bn,
                    model_wrapper_cfg=dict(
                        type='MMDistributedDataParallel', device_ids=None
                    ),
                )
            ),
        )
        runner.train()
    return {k: v.clone() for k, v in model.state_dict().items()}


def compare(processes, tmp_path, model, lr, sync_bn, hooks):
    """Two processes against one, as Runners."""
    results = processes.run(
        train,
        [model] * 2,
        [str(tmp_path / f'rank{rank}') for rank in range(2)],
        [1] * 2,
        [lr] * 2,
        ['pytorch'] * 2,
        [sync_bn] * 2,
        [hooks] * 2,
    )
    single = copy.deepcopy(model)
    whole = train(single, str(tmp_path / 'single'), 2, lr, 'none', None, [])
    for result in results:
        assert list(result) == list(whole)
        for name in whole:
            close(result[name], whole[name])
    changed = [
        k for k, v in model.state_dict().items() if (v != whole[k]).any()
    ]
    return changed


@pytest.mark.parametrize('sync_bn', ['torch', 'mmcv', None])
@pytest.mark.parametrize('estimate', [True, False])
def test_a_runner_on_two_processes_trains_as_one(
    processes, tmp_path, sync_bn, estimate
):
    kind = BCN if sync_bn else SyncBCN
    norms = [kind(8, 4, momentum=0.3, estimate=estimate) for _ in range(2)]
    model = Model(
        ConvWS(4, 8, 3, bias=False),
        norms[0],
        nn.ReLU(True),
        ConvWS(8, 8, 1, bias=False),
        norms[1],
    )
    changed = compare(processes, tmp_path, model, 0.1, sync_bn, [])
    assert set(changed) == set(model.state_dict())


def test_the_hook_gives_the_estimates_of_all_images(processes, tmp_path):
    # A first layer's input does not depend on estimates: with nothing
    # learned they must be those of one process, over several iterations.
    model = Model(ConvWS(4, 8, 3, bias=False), BCN(8, 4, momentum=0.3))
    hooks = [dict(type='SyncEstimatesHook')]
    changed = compare(processes, tmp_path, model, 0.0, None, hooks)
    assert set(changed) == {
        f'layers.1.{name}'
        for name in ('running_mean', 'running_var', 'num_batches_tracked')
    }


def run_average(model, x):
    for layer in model:
        layer(x)
    before = copy.deepcopy(model.state_dict())
    with mock.patch.object(dist, 'all_reduce', wraps=dist.all_reduce) as call:
        average_estimates(model)
    (call,) = call.call_args_list
    return before, model.state_dict(), call.args[0].numel()


def test_one_all_reduce_for_the_whole_network(processes):
    frozen = BCN(8)
    frozen.eval()
    with torch.no_grad():
        frozen.running_mean.normal_()
    model = nn.Sequential(
        BCN(8), BGN(8, 2), MABN(8, 1, 2), frozen, nn.BatchNorm2d(8)
    )
    x = torch.randn(4, 8, 5, 5) * 3
    results = processes.run(run_average, [model] * 2, x.split([3, 1]))
    (first, after, size), (second, after_second, _) = results
    assert size == 8 + 8 + 2 + 2 + 8  # the frozen layer costs nothing
    averaged = [
        f'{layer}.running_{name}'
        for layer, name in (
            (0, 'mean'),
            (0, 'var'),
            (1, 'mean'),
            (1, 'var'),
            (2, 'var'),
        )
    ]
    for key in after:
        if key in averaged:
            mean = (first[key].double() + second[key].double()) / 2
            torch.testing.assert_close(after[key], mean.float())
            assert (first[key] != second[key]).any()
            assert (after[key] == after_second[key]).all()
        else:
            assert (after[key] == first[key]).all(), key


def run_synchronized(model, x):
    model(x)
    with mock.patch.object(dist, 'all_reduce', wraps=dist.all_reduce) as call:
        average_estimates(model)
    return call.call_count


def test_synchronized_layers_need_no_hook(processes):
    x = torch.randn(2, 8, 5, 5)
    calls = processes.run(run_synchronized, [SyncBCN(8)] * 2, x.split(1))
    assert calls == [0, 0]


def test_one_process_has_nothing_to_do():
    model = BCN(8)
    model(torch.randn(2, 8, 3, 3))
    before = copy.deepcopy(model.state_dict())
    average_estimates(model)
    for key, value in model.state_dict().items():
        assert (value == before[key]).all()


def test_registered_and_checked():
    hook = HOOKS.build(dict(type='SyncEstimatesHook', interval=2))
    assert isinstance(hook, SyncEstimatesHook) and hook.interval == 2
    with pytest.raises(ValueError, match='interval must be a positive'):
        SyncEstimatesHook(interval=0)


def test_interval():
    hook = SyncEstimatesHook(interval=2)
    with mock.patch(
        'wsbcn_mm.engine.hooks.sync_estimates_hook.average_estimates'
    ) as average:
        for iteration in range(4):
            hook.after_train_iter(mock.Mock(iter=iteration), iteration)
    assert average.call_count == 2
