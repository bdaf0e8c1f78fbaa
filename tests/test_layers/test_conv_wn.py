import copy
import gc
import math

import mmcv.cnn
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from wsbcn_mm import ConvCWN, ConvWN
from wsbcn_mm.functional import normalize_weight

CLASSES = [ConvWN, ConvCWN]


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance
    )


def definition(weight, gain, centered):
    """One filter at a time, as the papers say."""
    filters = []
    for v, g in zip(weight, gain):
        if centered:
            v = v - v.sum() / v.numel()
        filters.append(g * v / (v * v).sum().sqrt())
    return torch.stack(filters)


@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(kernel_size=3, groups=2, dilation=2, padding=2),
        dict(kernel_size=1, stride=2),
        dict(kernel_size=3, padding=1, padding_mode='circular', bias=False),
    ],
)
def test_float64_definition(cls, kwargs):
    conv = cls(4, 6, dtype=torch.float64, **kwargs)
    plain = nn.Conv2d(4, 6, dtype=torch.float64, **kwargs)
    nn.init.uniform_(conv.gain, -2, 2)
    plain.bias = conv.bias
    weight = conv.weight.detach().requires_grad_()
    gain = conv.gain.detach().requires_grad_()
    expected = definition(weight, gain, conv.centered)
    x = torch.randn(2, 4, 7, 7).double().requires_grad_()
    grad = torch.randn_like(conv(x))
    got = torch.autograd.grad(conv(x), (x, conv.weight, conv.gain), grad)
    y = plain._conv_forward(x, expected, plain.bias)
    wanted = torch.autograd.grad(y, (x, weight, gain), grad)
    close(conv(x), y)
    for a, b in zip(got, wanted):
        close(a, b)
    close(conv.standardized_weight(), expected)


@pytest.mark.parametrize('centered', [False, True])
def test_gradients_of_gradients(centered):
    weight = torch.randn(3, 2, 2, 2).double().requires_grad_()
    gain = torch.rand(3).double().requires_grad_()

    def function(weight, gain):
        return normalize_weight(weight, gain, centered=centered)

    assert torch.autograd.gradcheck(function, (weight, gain))
    assert torch.autograd.gradgradcheck(function, (weight, gain))


@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize('value', [0.0, 0.1])
def test_a_constant_filter_is_finite(cls, value):
    conv = cls(4, 8, 3)
    nn.init.constant_(conv.weight, value)
    y = conv(torch.randn(1, 4, 5, 5))
    y.sum().backward()
    assert y.isfinite().all()
    for parameter in conv.parameters():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('cls', CLASSES)
def test_plain_checkpoint_sets_the_gain(cls):
    plain = nn.Conv2d(4, 8, 3, dtype=torch.float64)
    conv = cls(4, 8, 3, dtype=torch.float64)
    conv.load_state_dict(plain.state_dict())
    weight = plain.weight.detach()
    if conv.centered:
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
    close(conv.standardized_weight(), weight)
    conv.load_state_dict(copy.deepcopy(conv).state_dict())
    close(conv.standardized_weight(), weight)


@pytest.mark.parametrize(
    'weight_norm',
    [
        # Deprecated, but what old checkpoints were saved with.
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
    ],
)
def test_weight_norm_checkpoints_of_torch(weight_norm):
    theirs = weight_norm(nn.Conv2d(4, 8, 3, dtype=torch.float64))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    conv = ConvWN(4, 8, 3, dtype=torch.float64)
    conv.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 5).double()
    close(conv(x), theirs(x))


@pytest.mark.parametrize('cls', CLASSES)
def test_the_gain_at_the_start_and_after_a_reset(cls):
    conv = cls(64, 32, 3)
    nn.init.zeros_(conv.gain)
    conv.reset_parameters()
    norms = conv.standardized_weight().flatten(1).norm(dim=1)
    close(norms, torch.full((32,), math.sqrt(2)), 1e-5)


@pytest.mark.parametrize('cls', CLASSES)
def test_half_precision_has_its_norm_in_float32(cls):
    conv = cls(512, 8, 3)
    nn.init.normal_(conv.weight, std=40)  # squares beyond float16
    expected = conv.standardized_weight()
    half = copy.deepcopy(conv).half()
    assert half.standardized_weight().dtype == torch.half
    close(half.standardized_weight().float(), expected, 1e-3)
    with torch.autocast('cpu', torch.bfloat16):
        y = conv(torch.randn(1, 512, 5, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize('cls', CLASSES)
def test_registered(cls):
    name = cls.__name__
    assert MODELS.get(name) is cls
    conv = mmcv.cnn.build_conv_layer(dict(type=name, eps=1e-4), 4, 8, 3)
    assert type(conv) is cls and 'eps=0.0001' in repr(conv)
    x = torch.randn(1, 4, 5, 5)
    assert (copy.deepcopy(conv)(x) == conv(x)).all()
    assert conv(x[:0]).shape == (0, 8, 3, 3)


def test_bad_arguments():
    for cls in CLASSES:
        with pytest.raises(ValueError, match='eps.*-1'):
            cls(4, 8, 3, eps=-1)
    with pytest.raises(ValueError, match='in_channels=8, groups=8'):
        ConvCWN(8, 8, 1, groups=8)
    # A filter of one weight has a norm, if no deviation.
    y = ConvWN(8, 8, 1, groups=8)(torch.randn(1, 8, 3, 3))
    assert y.isfinite().all()


def count_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize('layer', CLASSES)
def test_steps_leave_nothing_behind(layer):
    """A graph whose hooks hold an output of its own is never freed."""
    conv, x, counts = layer(4, 6, 3), torch.randn(1, 4, 5, 5), []
    for _ in range(4):
        conv(x).sum().backward()
        counts.append(count_tensors())
    assert counts[1] >= counts[3]  # fewer: what an earlier test left
