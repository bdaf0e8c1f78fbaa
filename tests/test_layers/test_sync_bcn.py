import copy
import pickle
from unittest import mock

import mmcv.cnn
import pytest
import torch
import torch.distributed as dist
from mmengine.model import (
    MMDistributedDataParallel,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BCN, BGN, MABN, ConvWS, SyncBCN

STEPS = 3


def torch_convert(module):
    network = nn.Sequential(module)
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return module.double()


class Communication:
    """Counts what is communicated within it."""

    NAMES = ('all_gather', 'all_reduce')

    def __enter__(self):
        self.count = 0
        self._patches = [
            mock.patch.object(dist, name, self._counted(getattr(dist, name)))
            for name in self.NAMES
        ]
        for patch in self._patches:
            patch.start()
        return self

    def _counted(self, function):
        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counted

    def __exit__(self, *args):
        for patch in self._patches:
            patch.stop()


def run(module, inputs, grads):
    """Train a few steps: all that comes of it, and what it cost."""
    outputs, input_grads, parameter_grads, costs = [], [], [], []
    for x, grad in zip(inputs, grads):
        x = x.clone().requires_grad_()
        module.zero_grad()
        with Communication() as forward:
            y = module(x)
        with Communication() as backward:
            y.backward(grad)
        outputs.append(y.detach())
        input_grads.append(x.grad)
        parameter_grads.append([p.grad for p in module.parameters()])
        costs.append((forward.count, backward.count))
    return dict(
        outputs=outputs,
        input_grads=input_grads,
        parameter_grads=parameter_grads,
        buffers=dict(module.named_buffers()),
        costs=costs,
    )


def batches(size, channels=8):
    return [
        torch.randn(size, channels, 4, 3, dtype=torch.double) * 2 + 5
        for _ in range(STEPS)
    ]


def shares(tensors, counts):
    """What each process gets of a list of batches."""
    return list(zip(*(t.split(counts) for t in tensors)))


def check_parity(processes, shared, single, counts):
    """Processes with shares of a batch compute what one with all does."""
    inputs, grads = batches(sum(counts)), batches(sum(counts))
    results = processes.run(
        run, [shared] * 2, shares(inputs, counts), shares(grads, counts)
    )
    whole = run(single, inputs, grads)
    for step in range(STEPS):
        for key in ('outputs', 'input_grads'):
            close(torch.cat([r[key][step] for r in results]), whole[key][step])
        for ours, expected in zip(
            zip(*(r['parameter_grads'][step] for r in results)),
            whole['parameter_grads'][step],
        ):
            close(sum(ours), expected)
    for result in results:
        assert result['buffers'].keys() == whole['buffers'].keys()
        for name, buffer in whole['buffers'].items():
            close(result['buffers'][name], buffer)
    return [result['costs'] for result in results]


@pytest.mark.parametrize('counts', [(1, 1), (3, 1), (0, 2)])
@pytest.mark.parametrize('estimate', [True, False])
@pytest.mark.parametrize('momentum', [0.3, None])
def test_processes_compute_what_one_does(
    processes, estimate, counts, momentum
):
    single = randomized(BCN(8, 4, momentum=momentum, estimate=estimate))
    shared = SyncBCN(8, 4, momentum=momentum, estimate=estimate).double()
    shared.load_state_dict(single.state_dict())
    costs = check_parity(processes, shared, single, counts)
    backward = 0 if estimate else 1
    assert costs == [[(1, backward)] * STEPS] * 2


@pytest.mark.parametrize('counts', [(1, 1), (3, 1), (0, 2)])
@pytest.mark.parametrize('grad_averaging', [4, 0.3])
def test_processes_average_the_gradient_of_all_images(
    processes, grad_averaging, counts
):
    settings = dict(momentum=0.3, grad_averaging=grad_averaging)
    single = randomized(BCN(8, 4, **settings))
    shared = SyncBCN(8, 4, **settings).double()
    shared.load_state_dict(single.state_dict())
    costs = check_parity(processes, shared, single, counts)
    assert costs == [[(1, 1)] * STEPS] * 2


@pytest.mark.parametrize('counts', [(1, 1), (2, 0)])
@pytest.mark.parametrize(
    'norm',
    [
        BGN(8, 4),
        BGN(8, 16),
        MABN(8, 2, 2, warmup_iters=1),
        MABN(8, 2, 4, warmup_iters=0),
    ],
    ids=['bgn', 'bgn_split', 'mabn', 'mabn_buffered'],
)
def test_sync_bn_reaches_the_whole_family(processes, norm, counts):
    single = randomized(copy.deepcopy(norm))
    shared = torch_convert(copy.deepcopy(single))
    check_parity(processes, shared, single, counts)


def convert_by_mmengine(module, implementation, inputs, grads):
    return run(convert_sync_batchnorm(module, implementation), inputs, grads)


@pytest.mark.parametrize('implementation', ['torch', 'mmcv'])
def test_sync_bn_of_mmengine(processes, implementation):
    single = randomized(nn.Sequential(ConvWS(8, 8, 1), BCN(8, 4)))
    inputs, grads = batches(2), batches(2)
    results = processes.run(
        convert_by_mmengine,
        [single] * 2,
        [implementation] * 2,
        shares(inputs, (1, 1)),
        shares(grads, (1, 1)),
    )
    whole = run(single, inputs, grads)
    for step in range(STEPS):
        outputs = torch.cat([r['outputs'][step] for r in results])
        close(outputs, whole['outputs'][step])
    for result in results:
        assert result['costs'] == [(1, 0)] * STEPS
        for name, buffer in whole['buffers'].items():
            close(result['buffers'][name], buffer)


def convert_and_copy(module):
    module = convert_sync_batchnorm(module, 'mmcv')
    module.append(SyncBCN(8, 4, process_group=dist.group.WORLD))
    return copy.deepcopy(module)


def test_the_default_group_is_copied_and_pickled(processes):
    net = nn.Sequential(BCN(8, 4), MABN(8, 1, 2))
    for copied in processes.run(convert_and_copy, [net] * 2):
        for norm in copied:
            assert norm.is_synchronized


@pytest.mark.parametrize(
    'quiet',
    [
        lambda norm: norm.eval(),
        lambda norm: setattr(norm, 'is_synchronized', False) or norm,
    ],
    ids=['eval', 'switched_off'],
)
@pytest.mark.parametrize('estimate', [True, False])
def test_no_communication_where_none_is_wanted(processes, quiet, estimate):
    shared = quiet(randomized(SyncBCN(8, 4, estimate=estimate)))
    local = BCN(8, 4, estimate=estimate).double()
    local.load_state_dict(shared.state_dict())
    local.train(shared.training)
    inputs, grads = batches(2), batches(2)
    results = processes.run(
        run, [shared] * 2, shares(inputs, (1, 1)), shares(grads, (1, 1))
    )
    assert [r['costs'] for r in results] == [[(0, 0)] * STEPS] * 2
    alone = run(local, [x[:1] for x in inputs], [g[:1] for g in grads])
    for step in range(STEPS):
        close(results[0]['outputs'][step], alone['outputs'][step])


def test_without_a_group_it_is_a_bcn():
    single = randomized(BCN(8, 4))
    shared = SyncBCN(8, 4).double()
    shared.load_state_dict(single.state_dict())
    inputs, grads = batches(2), batches(2)
    result, whole = run(shared, inputs, grads), run(single, inputs, grads)
    for step in range(STEPS):
        close(result['outputs'][step], whole['outputs'][step])
    single.load_state_dict(shared.state_dict())
    assert SyncBCN._abbr_ == BCN._abbr_ == 'bcn'


@pytest.mark.parametrize(
    'norm',
    [
        SyncBCN(8),
        SyncBCN(8, grad_averaging=4),
        SyncBCN(8, grad_averaging=0.3),
        SyncBCN(8, estimate=False),
        torch_convert(MABN(8, 1, 2)),
    ],
    ids=['micro', 'window', 'exponential', 'large', 'mabn'],
)
def test_no_process_has_a_sample(processes, norm):
    before = copy.deepcopy(dict(norm.double().named_buffers()))
    empty = [x[:0] for x in batches(1)]
    for result in processes.run(run, [norm] * 2, [empty] * 2, [empty] * 2):
        for name, buffer in result['buffers'].items():
            close(buffer, before[name])
        for grad in result['parameter_grads'][0]:
            close(grad, torch.zeros_like(grad))


@pytest.mark.parametrize('size', [(0, 8, 4, 3), (1, 8, 0, 3)])
def test_a_process_without_positions_leaves_averages_to_others(
    processes, size
):
    norm = SyncBCN(8, 4, grad_averaging=4).double()
    single = BCN(8, 4, grad_averaging=4).double()
    xs, nothing = batches(2), [torch.zeros(size).double()] * STEPS
    results = processes.run(run, [norm] * 2, [nothing, xs], [nothing, xs])
    expected = run(single, xs, xs)
    close(results[1]['input_grads'], expected['input_grads'])
    for result in results:
        close(result['buffers'], expected['buffers'])


def test_norm_eval_reaches_a_converted_layer():
    norm = torch_convert(BCN(8))
    assert isinstance(norm, BCN) and 'synchronized' in repr(norm)
    for module in norm.modules():  # as a backbone does in train()
        if isinstance(module, _BatchNorm):
            module.eval()
    norm(torch.randn(2, 8, 3, 3))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize('norm', [BCN(8), BGN(8, 4), MABN(8, 1)])
def test_a_layer_in_no_network_is_not_converted(norm):
    with pytest.raises(RuntimeError, match='synchronize'):
        nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    with pytest.raises(RuntimeError, match='synchronize'):
        convert_sync_batchnorm(norm, 'mmcv')


def test_reverting_leaves_a_layer_that_runs_alone():
    network = nn.Sequential(SyncBCN(8, 4), nn.Sequential(SyncBCN(8)))
    reverted = revert_sync_batchnorm(network)
    assert [type(m) for m in reverted.modules()].count(SyncBCN) == 2
    x = torch.randn(2, 8, 3, 3)
    single = BCN(8, 4)
    torch.testing.assert_close(reverted[0](x), single(x))


def test_registered_copied_and_pickled():
    assert MODELS.get('SyncBCN') is SyncBCN
    cfg = dict(type='SyncBCN', num_groups=4)
    name, norm = mmcv.cnn.build_norm_layer(cfg, 8, postfix=1)
    assert name == 'bcn1'
    x = torch.randn(2, 8, 3, 3)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert (other(x) == copy.deepcopy(norm)(x)).all()


def run_groups(rank, x):
    """Each process in a group of its own."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    norm = SyncBCN(8, momentum=0.5, process_group=groups[rank]).double()
    with Communication() as communication:
        norm(x)
    return norm.running_mean, communication.count


def test_process_group(processes):
    x = batches(2)[0]
    results = processes.run(run_groups, [0, 1], x.split(1))
    for sample, (running_mean, communications) in zip(x, results):
        close(running_mean, sample.mean((1, 2)) / 2)
        assert communications == 0


def run_checkpointed(norm, x, grad):
    x.requires_grad_()
    y = checkpoint(norm, x, use_reentrant=False)
    with Communication() as backward:
        y.backward(grad)
    return x.grad, norm.num_batches_tracked, backward.count


def test_activation_checkpointing_communicates_once(processes):
    norm = randomized(SyncBCN(8, 4, momentum=0.3))
    x, grad = batches(2)[:2]
    results = processes.run(
        run_checkpointed, [norm] * 2, x.split(1), grad.split(1)
    )
    single = BCN(8, 4, momentum=0.3).double()
    single.load_state_dict(norm.state_dict())
    whole = run(single, [x], [grad])
    close(torch.cat([r[0] for r in results]), whole['input_grads'][0])
    assert [r[1:] for r in results] == [(1, 0)] * 2


def test_activation_checkpointing_moves_gradient_averages_once(processes):
    settings = dict(momentum=0.3, grad_averaging=4)
    norm = randomized(SyncBCN(8, 4, **settings))
    x, grad = batches(2)[:2]
    results = processes.run(
        run_checkpointed, [norm] * 2, x.split(1), grad.split(1)
    )
    single = BCN(8, 4, **settings).double()
    single.load_state_dict(norm.state_dict())
    whole = run(single, [x], [grad])
    close(torch.cat([r[0] for r in results]), whole['input_grads'][0])
    # The batch is gathered again in the forward that is done again.
    assert [r[1:] for r in results] == [(1, 2)] * 2


class Model(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = ConvWS(8, 8, 3, padding=1, bias=False)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x)).relu_()


def run_wrapped(model, x):
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    wrapped(x).square().mean().backward()
    return [p.grad for p in model.parameters()], dict(model.named_buffers())


@pytest.mark.parametrize(
    'settings', [{}, dict(estimate=False), dict(grad_averaging=4)]
)
def test_data_parallel_gradients_are_those_of_the_mean_loss(
    processes, settings
):
    model = randomized(Model(BCN(8, 4, momentum=0.3, **settings)))
    x = batches(2)[0]
    results = processes.run(
        run_wrapped, [torch_convert(copy.deepcopy(model))] * 2, x.split(1)
    )
    model(x).square().mean().backward()
    for grads, buffers in results:
        for grad, parameter in zip(grads, model.parameters()):
            close(grad, parameter.grad)
        for name, buffer in model.named_buffers():
            if name == 'norm.grad_statistics':  # of the sum of both losses
                buffer = torch.cat([buffer[:, :2], 2 * buffer[:, 2:]], 1)
            close(buffers[name], buffer)


def run_alone(norm, xs, broadcast):
    model = MMDistributedDataParallel(
        Model(norm).double(), broadcast_buffers=broadcast
    )
    for x in xs:
        model(x).square().mean().backward()
    return model.module.norm.grad_statistics, model.module.norm.grad_images


@pytest.mark.parametrize('broadcast', [True, False])
def test_without_synchronization_processes_average_their_own(
    processes, broadcast
):
    norm = BCN(8, 4, momentum=0.3, grad_averaging=0.3)
    xs = batches(2)
    results = processes.run(
        run_alone, [norm] * 2, shares(xs, (1, 1)), [broadcast] * 2
    )
    assert all(images == STEPS for _, images in results)
    assert (results[0][0] != results[1][0]).any()


def run_once(norm, x):
    norm(x)
    return norm.running_mean, norm.running_var


def test_a_large_mean_keeps_its_digits(processes):
    # E[x^2] - E[x]^2 in float32 would have none left.
    norm = SyncBCN(8, momentum=1.0, estimate=False)
    x = torch.randn(2, 8, 16, 16) + 1e4
    expected = x.double().transpose(0, 1).flatten(1).var(1).float()
    for _, var in processes.run(run_once, [norm] * 2, x.split(1)):
        torch.testing.assert_close(var, expected, rtol=1e-2, atol=0)


def test_images_of_different_sizes_count_the_same(processes):
    # As a detector pads them; a batch of one process has one size.
    norm = SyncBCN(8, momentum=1.0).double()
    xs = [torch.randn(1, 8, s, s + 1).double() + s for s in (3, 6)]
    mean = sum(x.mean((0, 2, 3)) for x in xs) / 2
    square = sum(x.square().mean((0, 2, 3)) for x in xs) / 2
    for result in processes.run(run_once, [norm] * 2, xs):
        close(result, (mean, square))  # about the old mean, 0
