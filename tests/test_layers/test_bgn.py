import copy

import mmcv.cnn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BGN


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance
    )


def randomized(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def definition(norm, x, mean=None, var=None):
    """As the paper says: flatten, split into runs, normalize each."""
    runs = x.reshape(len(x), norm.num_groups, -1)
    mean = runs.mean((0, 2)) if mean is None else mean
    var = runs.var((0, 2), correction=0) if var is None else var
    runs = (runs - mean.view(-1, 1)) / (var.view(-1, 1) + norm.eps).sqrt()
    column = (-1, *(1 for _ in x.shape[2:]))
    y = runs.view(x.shape)
    return y * norm.weight.view(column) + norm.bias.view(column)


@st.composite
def sizes(draw):
    """Channels, groups and spatial size that fit together."""
    channels = draw(st.integers(1, 9))
    spatial = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    values = channels * torch.Size(spatial).numel()
    groups = draw(
        st.sampled_from([g for g in range(1, values + 1) if values % g == 0])
    )
    return channels, groups, spatial


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 4), size=sizes(), training=st.booleans())
def test_float64_definition(n, size, training):
    channels, groups, spatial = size
    norm = BGN(channels, groups, momentum=0.3, dtype=torch.float64)
    randomized(norm).train(training)
    x = torch.randn(n, channels, *spatial).double().mul(3).add(1)
    x.requires_grad_()
    grad = torch.randn_like(x)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    y = norm(x)
    got = torch.autograd.grad(y, [x, *norm.parameters()], grad)
    if training:
        runs = x.detach().reshape(n, groups, -1)
        close(norm.running_mean, 0.7 * mean + 0.3 * runs.mean((0, 2)))
        close(norm.running_var, 0.7 * var + 0.3 * runs.var((0, 2)))
        mean = var = None
    expected = definition(norm, x, mean, var)
    wanted = torch.autograd.grad(expected, [x, *norm.parameters()], grad)
    close(y, expected, 1e-8)
    for a, b in zip(got, wanted):
        close(a, b, 1e-7)


@pytest.mark.parametrize('momentum', [0.1, None])
def test_with_one_channel_a_run_it_is_batch_norm(momentum):
    norm = BGN(6, 6, momentum=momentum, dtype=torch.float64)
    bn = nn.BatchNorm2d(6, momentum=momentum, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(2, 6, 4, 5).double() * 3 + 2
        close(norm(x), bn(x))
    for name, value in bn.state_dict().items():
        close(norm.state_dict()[name], value)
    close(norm.eval()(x), bn.eval()(x))


@pytest.mark.parametrize('groups', [2, 16])
def test_gradcheck(groups):
    norm = randomized(BGN(4, groups, momentum=0.0, dtype=torch.float64))
    x = torch.randn(2, 4, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


@pytest.mark.parametrize('groups', [1, 2, 6])
def test_batch_norm_checkpoint_keeps_its_function(groups):
    bn = nn.BatchNorm2d(6).double()
    bn(torch.randn(8, 6, 4, 4).double() * 3 + 2)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    norm = BGN(6, groups, dtype=torch.float64)
    norm.load_state_dict(bn.state_dict())
    x = torch.randn(2, 6, 4, 4).double()
    close(norm.eval()(x), bn.eval()(x), 1e-7)
    other = BGN(6, groups, dtype=torch.float64)
    other.load_state_dict(norm.state_dict())
    close(other.eval()(x), norm(x))


@pytest.mark.parametrize('groups', [1, 2, 6])
def test_inference_affine_is_evaluation(groups):
    norm = randomized(BGN(6, groups, dtype=torch.float64)).eval()
    scale, shift = norm.inference_affine()
    x = torch.randn(2, 6, 4, 4).double()
    close(norm(x), x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    with pytest.raises(ValueError, match='num_groups=12'):
        BGN(6, 12).inference_affine()


@pytest.mark.parametrize('groups', [2, 16])
def test_norm_eval_freezes_the_running_averages(groups):
    norm = randomized(BGN(8, groups))
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(2, 8, 4, 4)
    y = norm(x)
    y.sum().backward()
    for key, value in norm.state_dict().items():
        assert (value == before[key]).all()
    assert (y == norm.eval()(x)).all()


@pytest.mark.parametrize('groups', [2, 16])
def test_activation_checkpointing(groups):
    norm = randomized(BGN(8, groups, dtype=torch.float64))
    other = copy.deepcopy(norm)
    x = torch.randn(2, 8, 4, 4).double().requires_grad_()
    grad = torch.randn_like(x)
    y = checkpoint(norm, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(other(x), x, grad)
    close(got, expected)
    for key, value in norm.state_dict().items():
        close(value, other.state_dict()[key])


@pytest.mark.parametrize('groups', [2, 28])
def test_zero_rois(groups):
    norm = BGN(4, groups)
    before = copy.deepcopy(norm.state_dict())
    x = torch.zeros(0, 4, 7, 7, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    for key, value in norm.state_dict().items():
        assert (value == before[key]).all()
    for parameter in norm.parameters():
        assert not parameter.grad.any()


def test_one_value_a_run_is_refused_in_training():
    x = torch.randn(1, 8, 1, 1)
    with pytest.raises(ValueError, match=r'more than one.*\(1, 8, 1, 1\)'):
        BGN(8, 8)(x)
    assert BGN(8, 4)(x).abs().sum() > 0
    assert BGN(8, 8).eval()(x).isfinite().all()


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_an_overflow_does_not_poison_the_averages(value):
    norm = BGN(4, 2)
    x = torch.randn(2, 4, 3, 3)
    x[0, 3] = value
    norm(x)
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert norm.running_mean[0] != 0 and norm.running_mean[1] == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('groups', [2, 16])
def test_half_in_half_out_with_float32_statistics(dtype, training, groups):
    norm = randomized(BGN(8, groups)).train(training)
    expected = copy.deepcopy(norm).double()
    if not training:
        for module in (norm, expected):
            module.running_var.mul_(9e4)
    # Squares are beyond float16.
    x = (torch.randn(2, 8, 4, 4) * 300).to(dtype).requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
    close(y.double(), expected(x.detach().double()), 3e-2)
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(x).dtype == dtype
    assert norm.to(dtype)(x).dtype == dtype


@pytest.mark.parametrize('mean', [1e3, -1e4])
@pytest.mark.parametrize('groups', [2, 16])
def test_a_large_mean_keeps_its_digits(mean, groups):
    norm = BGN(8, groups)
    x = torch.randn(2, 8, 8, 8) + mean
    expected = definition(copy.deepcopy(norm).double(), x.double())
    close(norm(x), expected.float(), 5e-3)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('groups', [2, 16])
def test_in_place_relu_and_channels_last(training, groups):
    norm = randomized(BGN(8, groups)).train(training)
    x = torch.randn(2, 8, 4, 4)
    expected = torch.relu(norm(x))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = torch.relu_(norm(x))
    y.sum().backward()
    close(y, expected, 1e-5)
    for t in (y, x.grad):
        assert t.is_contiguous(memory_format=torch.channels_last)


def test_in_a_resnet_of_mmdet(mmdet_resnet):
    cfg = dict(type='BGN', num_groups=4)
    net = mmdet_resnet(18, base_channels=8, norm_cfg=cfg, norm_eval=False)
    net.init_weights()
    net.train()
    x = torch.randn(2, 3, 32, 32)
    sum(y.sum() for y in net(x)).backward()
    assert net.layer1[0].bgn2.weight.grad.abs().sum() > 0
    assert net.bgn1.num_batches_tracked == 1


@pytest.mark.parametrize('groups', [2, 16])
def test_compiles_without_graph_break(groups):
    norm = randomized(BGN(8, groups))
    compiled = copy.deepcopy(norm)
    x = torch.randn(2, 8, 4, 4)
    y = torch.compile(compiled, fullgraph=True, backend='aot_eager')(x)
    close(y, norm(x), 1e-5)
    close(compiled.running_var, norm.running_var, 1e-5)


def test_registered():
    assert MODELS.get('BGN') is BGN
    cfg = dict(type='BGN', num_groups=4)
    name, norm = mmcv.cnn.build_norm_layer(cfg, 16, postfix=1)
    assert name == 'bgn1' and isinstance(norm, BGN)
    assert 'num_groups=4' in repr(norm)
    x = torch.randn(2, 16, 4, 4)
    assert (copy.deepcopy(norm)(x) == norm(x)).all()


@pytest.mark.parametrize(
    'kwargs, error, words',
    [
        (dict(num_groups=0), ValueError, 'num_groups must be a positive'),
        (dict(num_groups=2.5), TypeError, 'num_groups.*2.5'),
        (dict(momentum=1.5), ValueError, 'momentum.*1.5'),
        (dict(eps='a'), TypeError, "eps.*'a'"),
        (dict(num_features=0), ValueError, 'num_features'),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        BGN(**dict(dict(num_features=8, num_groups=2), **kwargs))


@pytest.mark.parametrize(
    'x, error, words',
    [
        (torch.zeros(1, 4, 3, 3), ValueError, r'\(1, 4, 3, 3\)'),
        (torch.zeros(1, 8), ValueError, r'\(1, 8\)'),
        (torch.zeros(1, 8, 3, 3, dtype=torch.int), TypeError, 'int32'),
        (torch.zeros(2, 8, 3, 3), ValueError, r'=16.*8 \* 3 \* 3 = 72'),
    ],
)
def test_bad_inputs(x, error, words):
    with pytest.raises(error, match=words):
        BGN(8, 16)(x)
