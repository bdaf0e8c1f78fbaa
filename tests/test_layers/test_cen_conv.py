import copy

import mmcv.cnn
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn import functional as F

from wsbcn_mm import CenConv
from wsbcn_mm.functional import centralize_weight


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance
    )


def test_authors_vectors(vectors):
    v = vectors('conv_centralized', 'plain')
    conv = CenConv(
        5,
        7,
        3,
        stride=v.number('stride'),
        padding=v.number('padding'),
        dtype=torch.float64,
    )
    conv.load_state_dict(dict(weight=v['weight'], bias=v['bias']))
    x = v['x'].requires_grad_()
    y = conv(x)
    y.backward(v['grad_y'])
    close(y, v['y'])
    close(x.grad, v['grad_x'])
    close(conv.weight.grad, v['grad_weight'])
    close(conv.bias.grad, v['grad_bias'])


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(groups=2, dilation=2, padding=2),
        dict(kernel_size=1),
        dict(padding=1, padding_mode='reflect'),
        dict(kernel_size=(1, 3), stride=(2, 1), bias=False),
    ],
)
def test_float64_definition(kwargs):
    kwargs = dict(dict(kernel_size=3), **kwargs)
    conv = CenConv(4, 6, dtype=torch.float64, **kwargs)
    plain = nn.Conv2d(4, 6, dtype=torch.float64, **kwargs)
    mean = conv.weight.detach().mean((1, 2, 3), keepdim=True)
    plain.load_state_dict(conv.state_dict())
    with torch.no_grad():
        plain.weight -= mean
    x = torch.randn(2, 4, 7, 7).double()
    close(conv(x), plain(x))
    conv(x).square().sum().backward()
    plain(x).square().sum().backward()
    grad = plain.weight.grad
    close(conv.weight.grad, grad - grad.mean((1, 2, 3), keepdim=True))
    close(conv.standardized_weight(), plain.weight)


def test_gradients_of_gradients():
    weight = torch.randn(3, 2, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(centralize_weight, weight)
    assert torch.autograd.gradgradcheck(centralize_weight, weight)


def test_half_precision_has_its_mean_in_float32():
    # In float16 the sum of these would overflow.
    weight = torch.randn(2, 512, 3, 3).mul(5).add(100).half()
    centered = centralize_weight(weight)
    assert centered.dtype == torch.half
    close(centered.float(), centralize_weight(weight.float()), 2e-2)
    with torch.autocast('cpu', torch.bfloat16):
        y = CenConv(4, 8, 3)(torch.randn(1, 4, 5, 5))
    assert y.dtype == torch.bfloat16


def test_a_common_shift_does_not_show():
    conv = CenConv(4, 8, 3, dtype=torch.float64)
    x = torch.randn(1, 4, 5, 5).double()
    close(conv(x + 7), conv(x), 1e-12)


def test_channels_last_and_empty_batch():
    conv = CenConv(4, 8, 3, padding=1)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    expected = F.conv2d(
        x, centralize_weight(conv.weight), conv.bias, padding=1
    )
    close(conv(x), expected, 1e-5)
    assert conv(x[:0]).shape == (0, 8, 5, 5)


def test_registered_and_copied():
    assert MODELS.get('CenConv') is CenConv
    conv = mmcv.cnn.build_conv_layer(dict(type='CenConv'), 4, 8, 3)
    assert isinstance(conv, CenConv)
    x = torch.randn(1, 4, 5, 5)
    assert (copy.deepcopy(conv)(x) == conv(x)).all()


def test_a_filter_of_one_weight_is_refused():
    with pytest.raises(ValueError, match='in_channels=8, groups=8'):
        CenConv(8, 8, 1, groups=8)
