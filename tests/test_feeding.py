import copy

import pytest
import torch
from torch import nn

from wsbcn_mm import BCN
from wsbcn_mm.feeding import find_feeding_convolutions


class PreActivation(nn.Module):
    """Names and order say conv1 -> norm2; the forward does not."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 1)
        self.norm2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv1(torch.relu(self.norm1(x)))
        return self.conv2(torch.relu(self.norm2(torch.relu(x))))


class TwoUses(nn.Module):
    def __init__(self, look=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = BCN(8)
        self.look = look

    def forward(self, x):
        x = self.conv(x)
        if self.look:
            return self.norm(x), x.shape[2:], x.size()
        return self.norm(x) + x


class CalledTwice(nn.Module):
    """The second call of the convolution is not normalized."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, x):
        return self.conv(torch.relu(self.norm(self.conv(x))))


class SharedHead(nn.Module):
    """Five levels, one head: conv and norm are always called together."""

    def __init__(self, own_norms=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(8) for _ in range(2 if own_norms else 1)]
        )

    def forward(self, a, b):
        return self.norms[0](self.conv(a)), self.norms[-1](self.conv(b))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.extra = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        if x.sum() > 0:
            x = self.bn1(self.conv1(x))
        return self.block(x)


def test_sequential():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), BCN(8), nn.ReLU(), nn.GroupNorm(2, 8)
    )
    found = find_feeding_convolutions(net)
    assert set(found) == {'1', '3'}  # not the child of BCN
    assert found['1'].convolution == '0' and found['1'].exclusive
    assert found['3'].convolution is None
    assert 'no convolution' in found['3'].reason


def test_a_norm_alone():
    assert find_feeding_convolutions(BCN(8))[''].convolution is None


def test_the_forward_decides_and_not_names():
    found = find_feeding_convolutions(PreActivation())
    assert found['norm1'].convolution is None
    assert found['norm2'].convolution is None


@pytest.mark.parametrize(
    'net, name, reason',
    [
        (TwoUses(), 'norm', 'used elsewhere'),
        (CalledTwice(), 'norm', 'used elsewhere'),
        (SharedHead(own_norms=True), 'norms.0', 'feeds norms.1 as well'),
        (SharedHead(own_norms=True), 'norms.1', 'feeds norms.0 as well'),
    ],
)
def test_a_convolution_with_other_uses_is_not_exclusive(net, name, reason):
    found = find_feeding_convolutions(net)[name]
    assert found.convolution == 'conv' and not found.exclusive
    assert reason in found.reason


def test_looking_at_the_shape_is_no_use():
    assert find_feeding_convolutions(TwoUses(look=True))['norm'].exclusive


def test_calls_for_several_inputs():
    assert find_feeding_convolutions(SharedHead())['norms.0'].exclusive


def test_tied_weights_are_not_exclusive():
    net = nn.ModuleList(
        nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8)) for _ in range(2)
    )
    net[1][0].weight = net[0][0].weight
    for feeding in find_feeding_convolutions(net).values():
        assert not feeding.exclusive and 'shares its weight' in feeding.reason


class UsesParameter(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.GroupNorm(1, 3)
        self.use = use

    def forward(self, x):
        return self.use(self.norm(self.conv(x)), self.conv)


@pytest.mark.parametrize(
    'use',
    [
        lambda x, conv: nn.functional.conv2d(x, conv.weight),
        lambda x, conv: x + conv.bias.view(-1, 1, 1),
        lambda x, conv: x * conv.weight.detach().norm(),
    ],
)
def test_a_parameter_used_outside_the_call_is_a_use(use):
    for net in (UsesParameter(use), nn.Sequential(UsesParameter(use))):
        (feeding,) = find_feeding_convolutions(net).values()
        assert feeding.convolution.endswith('conv')
        assert not feeding.exclusive
        assert 'used elsewhere' in feeding.reason


def test_looking_at_the_dtype_of_a_parameter_is_no_use():
    net = UsesParameter(lambda x, conv: x.to(conv.weight.dtype))
    assert find_feeding_convolutions(net)['norm'].exclusive


def test_parts_of_what_cannot_be_traced():
    found = find_feeding_convolutions(Untraceable())
    assert found['block.1'].traced and found['block.1'].exclusive
    assert found['bn1'].convolution == 'conv1'
    assert not found['bn1'].traced and not found['bn1'].exclusive
    assert found['bn2'].convolution is None


def test_mmcv_block_with_checkpointing():
    mmdet = pytest.importorskip('mmdet.models')
    net = mmdet.ResNet(
        50, norm_cfg=dict(type='BCN'), conv_cfg=dict(type='ConvWS')
    )
    net.train()
    for block in net.layer1:
        block.with_cp = True
    found = find_feeding_convolutions(net)
    assert len(found) == 53
    assert all(f.exclusive and f.traced for f in found.values())
    assert found['layer1.0.bcn2'].convolution == 'layer1.0.conv2'
    assert found['layer2.0.downsample.1'].convolution == (
        'layer2.0.downsample.0'
    )


def test_convmodule_after_activation():
    from mmcv.cnn import ConvModule

    net = ConvModule(
        8, 8, 3, norm_cfg=dict(type='BCN'), order=('norm', 'act', 'conv')
    )
    assert find_feeding_convolutions(net)['bcn'].convolution is None
    net = ConvModule(8, 8, 3, norm_cfg=dict(type='BCN'))
    assert find_feeding_convolutions(net)['bcn'].exclusive


def test_timm_and_torchvision():
    timm = pytest.importorskip('timm')
    torchvision = pytest.importorskip('torchvision')
    found = find_feeding_convolutions(timm.create_model('efficientnet_b0'))
    assert all(f.exclusive for f in found.values()) and len(found) == 49
    found = find_feeding_convolutions(torchvision.models.densenet121())
    assert found['features.norm5'].convolution is None
    assert found['features.denseblock1.denselayer1.norm2'].exclusive


def test_the_network_is_left_as_it_was():
    centered = UsesParameter(lambda x, conv: x - torch.tensor([1.0]))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), BCN(8), TwoUses(), centered)
    before = copy.deepcopy(net.state_dict())
    keys = [sorted(m.__dict__) for m in net.modules()]
    find_feeding_convolutions(net)
    assert keys == [sorted(m.__dict__) for m in net.modules()]
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
