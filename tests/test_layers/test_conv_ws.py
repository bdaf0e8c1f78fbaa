import mmcv.cnn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmengine.registry import MODELS
from torch import nn

from wsbcn_mm import (
    BCN,
    ConvWS,
    ConvWS1d,
    ConvWS3d,
    convert_to_micro_batch,
    fold_for_inference,
    micro_batch_model,
)

CLASSES = {1: ConvWS1d, 2: ConvWS, 3: ConvWS3d}


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual.detach(), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize('case', ['plain', 'grouped', 'pointwise'])
def test_mmcv_vectors(vectors, case):
    v = vectors('conv_ws', case)
    groups = v.number('groups', 1)
    weight = v['weight']
    conv = ConvWS(
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2],
        stride=v.number('stride', 1),
        padding=v.number('padding', 0),
        dilation=v.number('dilation', 1),
        groups=groups,
        bias='bias' in v,
        dtype=torch.float64,
    )
    parameters = {'weight': conv.weight}
    if conv.bias is not None:
        parameters['bias'] = conv.bias
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(v[name])
    x = v['x'].requires_grad_()
    y = conv(x)
    y.backward(v['grad_y'])
    close(y, v['y'])
    close(x.grad, v['grad_x'])
    for name, parameter in parameters.items():
        close(parameter.grad, v[f'grad_{name}'])


@settings(max_examples=30, deadline=None)
@given(
    dimensions=st.sampled_from([1, 2, 3]),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    kernel=st.integers(2, 3),
    bias=st.booleans(),
    padding_mode=st.sampled_from(['zeros', 'circular', 'replicate']),
    inside=st.booleans(),
)
def test_parity_with_the_definition(
    dimensions, groups, per_group, kernel, bias, padding_mode, inside
):
    conv = CLASSES[dimensions](
        groups * per_group,
        groups * 2,
        kernel,
        padding=1,
        groups=groups,
        bias=bias,
        padding_mode=padding_mode,
        eps=0.1,
        eps_inside_sqrt=inside,
        dtype=torch.float64,
    )
    shape = (2, groups * per_group, *(5 for _ in range(dimensions)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *conv.parameters()], grad)

    flat = conv.weight.flatten(1)
    if inside:
        divisor = (flat.var(1, keepdim=True) + 0.1).sqrt()
    else:
        divisor = flat.std(1, keepdim=True) + 0.1
    weight = (flat - flat.mean(1, keepdim=True)) / divisor
    expected = conv._conv_forward(x, weight.view_as(conv.weight), conv.bias)
    wanted = torch.autograd.grad(expected, [x, *conv.parameters()], grad)
    close(y, expected.detach())
    for a, b in zip(got, wanted):
        close(a, b)


@pytest.mark.parametrize('inside', [False, True])
def test_gradcheck(inside):
    conv = ConvWS(2, 3, 2, eps_inside_sqrt=inside, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def function(weight):
        return torch.func.functional_call(conv, {'weight': weight}, x)

    weight = conv.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, weight)
    assert torch.autograd.gradgradcheck(function, weight)


@pytest.mark.parametrize('value', [0.0, 0.5, 0.1])
def test_a_constant_filter_has_a_finite_gradient(value):
    """Its standard deviation is 0 (0.1: but for rounding), and so divides."""
    conv = ConvWS(4, 2, 3)
    nn.init.constant_(conv.weight, value)
    y = conv(torch.randn(1, 4, 5, 5))
    y.sum().backward()
    assert y.isfinite().all() and conv.weight.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The squares of small float16 weights underflow: float32 statistics."""
    conv = ConvWS(16, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight.mul_(1e-2)
    half = ConvWS(16, 4, 3, bias=False).to(dtype)
    half.load_state_dict(conv.state_dict())
    with torch.no_grad():
        conv.weight.copy_(half.weight)
    x = torch.randn(1, 16, 5, 5).to(dtype)
    y = half(x)
    y.float().square().sum().mul(1e-3).backward()
    expected = conv(x.float())
    assert y.dtype == half.weight.grad.dtype == dtype
    assert half.weight.grad.isfinite().all()
    eps = torch.finfo(dtype).eps
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        y.float(), expected.detach(), rtol=0, atol=4 * eps * scale
    )


def test_autocast():
    conv = ConvWS(16, 4, 3)
    x = torch.randn(1, 16, 5, 5)
    with torch.autocast('cpu', torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    close(y.float(), conv(x).detach(), 0.1)


def test_replaces_mmcvs():
    assert MODELS.get('ConvWS') is ConvWS
    conv = mmcv.cnn.build_conv_layer(dict(type='ConvWS'), 4, 8, 3, padding=1)
    assert isinstance(conv, ConvWS)
    for name, cls in (('ConvWS1d', ConvWS1d), ('ConvWS3d', ConvWS3d)):
        assert MODELS.get(name) is cls


def test_the_same_numbers_as_mmcvs():
    theirs = ConvWS2d(8, 4, 3, stride=2, padding=1)
    ours = ConvWS(8, 4, 3, stride=2, padding=1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 9)
    close(ours(x), theirs(x).detach(), 1e-5)


@pytest.mark.parametrize(
    'change',
    [
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        lambda w: 2 * w,
        lambda w: w.half().float() / 3,
        lambda w: 0 * w,
        lambda w: w * torch.arange(64).view(-1, 1, 1, 1),  # filter by filter
        lambda w: torch.renorm(w, 2, 0, 0.1),
    ],
)
def test_another_weight_may_be_assigned(change):
    conv = ConvWS(4, 64, 3, bias=False)
    weight = change(conv.weight.detach())
    conv.weight = nn.Parameter(weight)
    conv = ConvWS(4, 64, 3, bias=False)
    conv.load_state_dict(dict(weight=change(conv.weight)), assign=True)
    assert conv.weight.dtype == weight.dtype


def test_the_form_is_shown_where_it_is_not_the_usual_one():
    assert 'eps_inside_sqrt' not in repr(ConvWS(4, 8, 3))
    conv = MODELS.build(
        dict(type='ConvWS', eps_inside_sqrt=True)
        | dict(in_channels=4, out_channels=8, kernel_size=3)
    )
    assert repr(conv).endswith('eps=1e-05, eps_inside_sqrt=True)')


def test_the_form_matters_for_small_weights():
    """By 45 % where a filter's standard deviation is 0.003."""
    outside, inside = ConvWS(8, 4, 3), ConvWS(8, 4, 3, eps_inside_sqrt=True)
    with torch.no_grad():
        outside.weight.mul_(0.003 / outside.weight.flatten(1).std(1).mean())
    inside.load_state_dict(outside.state_dict())
    ratio = outside.standardized_weight() / inside.standardized_weight()
    assert 1.3 < ratio.median() < 1.6


@pytest.mark.parametrize('inside', [False, True])
def test_folding_keeps_the_form(inside):
    net = nn.Sequential(
        ConvWS(3, 8, 3, bias=False, eps_inside_sqrt=inside), BCN(8, 4)
    )
    net = net.double().eval()
    with torch.no_grad():
        net[0].weight.mul_(0.01)
        net[1].running_mean.normal_()
    folded = fold_for_inference(net)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert type(folded[0]) is nn.Conv2d
    close(folded(x), net(x).detach())


@pytest.mark.parametrize('inside', [False, True])
def test_a_config_and_a_conversion_choose_the_form(inside):
    pytest.importorskip('mmpretrain.models')
    conv_cfg = dict(type='ConvWS', eps_inside_sqrt=inside)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    net = convert_to_micro_batch(net, conv_cfg=conv_cfg)
    assert net[0].eps_inside_sqrt is inside
    model = dict(type='mmpretrain.ResNet', depth=18, norm_cfg=dict(type='BN'))
    model = micro_batch_model(model, conv_cfg=conv_cfg)
    assert model.conv_cfg.eps_inside_sqrt is inside


def test_a_config_with_a_wrong_form_is_refused():
    pytest.importorskip('mmpretrain.models')
    model = dict(type='mmpretrain.ResNet', depth=18, norm_cfg=dict(type='BN'))
    for wrong in (dict(eps_inside_root=True), dict(eps_inside_sqrt='yes')):
        with pytest.raises((TypeError, ValueError), match='eps_inside_sqrt'):
            micro_batch_model(model, conv_cfg=dict(type='ConvWS', **wrong))


@pytest.mark.parametrize(
    ('kwargs', 'words'),
    [
        (dict(groups=8, kernel_size=1), ['ConvWS', 'one weight', 'groups=8']),
        (dict(eps=-1.0), ['ConvWS', 'eps', '-1.0']),
    ],
)
def test_bad_arguments(kwargs, words):
    arguments = dict(in_channels=8, out_channels=8, kernel_size=3)
    with pytest.raises(ValueError) as info:
        ConvWS(**{**arguments, **kwargs})
    for word in words:
        assert word in str(info.value)
