import os.path as osp
import sys

import pytest
import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from torch import nn

import wsbcn_mm  # noqa: F401

STUDY = osp.join(osp.dirname(__file__), '..', '..', 'tools', 'study')
sys.path.insert(0, STUDY)

from study.micro_batches import normalize_in_micro_batches  # noqa: E402


def network(norm_cfg, conv_cfg=None):
    torch.manual_seed(0)
    layers = []
    for channels in (3, 8, 8):
        layers += [
            build_conv_layer(conv_cfg, channels, 8, 3, padding=1),
            build_norm_layer(norm_cfg, 8)[1],
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers).double()


NORMS = dict(
    bn=dict(type='BN'),
    gn=dict(type='GN', num_groups=4),
    bcn=dict(type='BCN', num_groups=4, momentum=0.07),
    average=dict(type='BCN', num_groups=4, momentum=None),
    large=dict(type='BCN', num_groups=4, estimate=False),
    bgn=dict(type='BGN', num_groups=4),
    mabn=dict(type='MABN', simulated_batch_size=6, warmup_iters=0),
)


@pytest.mark.parametrize('images', [1, 2, 6])
@pytest.mark.parametrize('norm', NORMS)
def test_micro_batches_equal_one_after_another(norm, images):
    norm_cfg = dict(NORMS[norm])
    if norm == 'mabn':
        norm_cfg['batch_size'] = images
    one_by_one = network(norm_cfg, dict(type='ConvWS'))
    at_once = network(norm_cfg, dict(type='ConvWS'))
    normalize_in_micro_batches(at_once, images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):  # steps: estimates and buffers are carried over
        x = torch.randn(6, 3, 5, 5, generator=generator).double()
        x = 3 * x + 2
        one_by_one.zero_grad(), at_once.zero_grad()
        for part in x.split(images):
            (one_by_one(part) ** 3).sum().backward()
        (at_once(x) ** 3).sum().backward()
    for a, b in zip(at_once.parameters(), one_by_one.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-11)
    for a, b in zip(at_once.buffers(), one_by_one.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    at_once.eval(), one_by_one.eval()
    torch.testing.assert_close(at_once(x), one_by_one(x))


def test_micro_batches_differ_from_a_large_batch():
    small, large = network(NORMS['bn']), network(NORMS['bn'])
    normalize_in_micro_batches(small, 1)
    x = torch.randn(6, 3, 5, 5).double()
    assert (small(x) - large(x)).abs().max() > 0.1


def test_corrected_start_averages_first():
    model = network(NORMS['bcn'])
    normalize_in_micro_batches(model, 1, start='corrected')
    x = torch.randn(6, 3, 5, 5).double() + 1
    with torch.no_grad():
        model(x)
        first = model[0](x)
    torch.testing.assert_close(model[1].running_mean, first.mean((0, 2, 3)))


def test_micro_batches_refuse_a_remainder():
    model = network(NORMS['bn'])
    normalize_in_micro_batches(model, 4)
    with pytest.raises(ValueError, match='6 images.*micro-batches of 4'):
        model(torch.randn(6, 3, 5, 5).double())
