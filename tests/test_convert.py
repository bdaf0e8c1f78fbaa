import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import detection, segmentation
from torchvision.ops import FrozenBatchNorm2d

from wsbcn_mm import BCN, ConvWS, convert_to_micro_batch
from wsbcn_mm.layers import ConvWS1d, ConvWS3d


def conv_bn(**options):
    return nn.Sequential(nn.Conv2d(3, 64, 3, **options), nn.BatchNorm2d(64))


def changed(report):
    return [entry.name for entry in report.changed]


def reasons(report):
    return {entry.name: entry.reason for entry in report.left}


def train_one_step(net, loss):
    net.train()
    loss = loss(net)
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


class Block(nn.Module):
    """A pre-activation block: the normalization before the convolution."""

    def __init__(self):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        out = self.conv1(self.bn1(x).relu())
        return x + self.conv2(self.bn2(out).relu())


class Undecided(nn.Module):
    """What it does depends on its input: torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv1(x)
        if x.sum() > 0:  # the trap: nothing normalizes this one's output
            x = -x
        x = self.bn1(x.sigmoid())
        return self.bn2(self.conv2(x))


# What is converted ----------------------------------------------------------


def test_convolution_and_normalization_in_place():
    net = conv_bn()
    assert convert_to_micro_batch(net) is net
    assert isinstance(net[0], ConvWS) and isinstance(net[1], BCN)
    assert net[1].momentum == 0.01 * 1 / 16
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 64, 6, 6)


def test_update_rate_follows_the_images():
    net = convert_to_micro_batch(
        conv_bn(), images_per_gpu=2, images_per_update=32
    )
    assert net[1].momentum == 0.01 * 2 / 32
    net = convert_to_micro_batch(
        conv_bn(), dict(type='BCN', num_groups=4, momentum=0.5)
    )
    assert (net[1].momentum, net[1].num_groups) == (0.5, 4)


def test_other_dimensions_and_other_normalizations():
    net = nn.ModuleList(
        [
            nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)),
            nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)),
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8)),
            nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8)),
        ]
    )
    convert_to_micro_batch(net)
    assert [type(part[0]) for part in net] == [
        ConvWS1d,
        ConvWS3d,
        ConvWS,
        ConvWS,
    ]
    assert all(type(part[1]) is BCN for part in net)
    assert all(p.requires_grad for p in net.parameters())


def test_mmcv_layers():
    from mmcv.cnn import ConvModule
    from mmcv.ops import SyncBatchNorm

    net = nn.Sequential(
        ConvModule(
            3, 8, 3, conv_cfg=dict(type='Conv'), norm_cfg=dict(type='BN')
        )
    )
    convert_to_micro_batch(net)
    assert isinstance(net[0].conv, ConvWS) and isinstance(net[0].bn, BCN)
    # mmcv's own SyncBatchNorm wants a process group to be built: unbuilt.
    sync = SyncBatchNorm.__new__(SyncBatchNorm)
    nn.Module.__init__(sync)
    vars(sync).update(vars(nn.BatchNorm2d(8)))
    assert isinstance(convert_to_micro_batch(sync), BCN)


def test_group_norm_and_plain_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48))
    net[1].weight.data.fill_(2)
    convert_to_micro_batch(net, dict(type='GN'), dict(type='Conv2d'))
    assert type(net[0]) is nn.Conv2d
    assert type(net[1]) is nn.GroupNorm
    assert net[1].num_groups == 24  # the largest that divides 48
    assert (net[1].weight == 2).all()


@pytest.mark.parametrize('kind', ['MABN', 'SyncBCN', 'BGN'])
@pytest.mark.parametrize('conv', ['CenConv', 'ConvWN', 'ConvCWN'])
def test_the_rest_of_the_family(kind, conv):
    options = dict(num_groups=8) if kind == 'BGN' else {}
    net = convert_to_micro_batch(
        conv_bn(), dict(type=kind, **options), dict(type=conv)
    )
    assert type(net[0]).__name__ == conv and type(net[1]).__name__ == kind
    train_one_step(net, lambda m: m(torch.randn(2, 3, 8, 8)).square().mean())


def test_root_that_is_a_normalization_is_returned():
    norm = nn.BatchNorm2d(8)
    assert isinstance(convert_to_micro_batch(norm), BCN)


# What is there already ------------------------------------------------------


@pytest.mark.parametrize('norm', [BCN, nn.GroupNorm])
def test_convolutions_before_the_normalization_that_is_wanted(norm):
    cfg = dict(type='BCN' if norm is BCN else 'GN', num_groups=4)
    there = BCN(8, 4) if norm is BCN else nn.GroupNorm(4, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), there, nn.Conv2d(8, 2, 1))
    weight = net[0].weight
    net, report = convert_to_micro_batch(net, cfg, return_report=True)
    assert changed(report) == ['0']
    assert isinstance(net[0], ConvWS) and net[0].weight is weight
    assert net[1] is there and '1' in reasons(report)
    assert type(net[2]) is nn.Conv2d


@pytest.mark.parametrize(
    'norm',
    [nn.GroupNorm(4, 8), nn.GroupNorm(1, 8), nn.InstanceNorm2d(8)],
    ids=repr,
)
def test_convolutions_before_others_stay(norm):
    cfg = dict(type='GN' if norm.__dict__.get('num_groups') == 1 else 'BCN')
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, *conv_bn())
    net[2] = nn.Conv2d(8, 64, 3)
    report = convert_to_micro_batch(net, cfg, dry_run=True)
    assert changed(report) == ['2', '3']


def test_estimates_that_are_there_follow_the_filters():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), BCN(8, 4, eps=0, momentum=1.0))
    with torch.no_grad():
        net[0].weight.sub_(net[0].weight.mean((1, 2, 3), keepdim=True))
        net[0].weight.mul_(3)
    x = torch.randn(4, 3, 9, 9)
    net(x)  # the estimates are this batch's, of centred filters
    count = net[1].num_batches_tracked.item()
    expected = net.eval()(x)
    report = convert_to_micro_batch(net, dry_run=True)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    assert changed(report) == ['0']
    convert_to_micro_batch(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    assert net[1].num_batches_tracked == count


# Which convolution ----------------------------------------------------------


def test_only_where_a_normalization_follows():
    net = Block()
    report = convert_to_micro_batch(net, dry_run=True)
    assert changed(report) == ['bn1', 'conv1', 'bn2']
    assert reasons(report) == {
        'conv2': 'no batch normalization is seen to follow'
    }
    assert type(net.conv1) is nn.Conv2d  # a dry run


def test_namesakes_where_convolutions_are_made_first():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(8, 8, 1)
            self.conv2 = nn.Conv2d(8, 8, 1)
            self.bn1 = nn.BatchNorm2d(8)
            self.bn2 = nn.BatchNorm2d(8)
            self.bn3 = nn.BatchNorm2d(8)  # before its convolution
            self.conv3 = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.bn1(self.conv1(x))
            return self.conv3(self.bn3(self.bn2(self.conv2(x))))

    class Undecided(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    # Both times the same, in the one case it is known.
    for net, how in ((Net(), 'traced'), (Undecided(), 'judged by names')):
        report = convert_to_micro_batch(net, dry_run=True)
        found = {e.name: e.reason for e in report.changed}
        assert found['conv1'] == found['conv2'] == how
        assert found['bn1'] == 'after conv1' and found['bn3'] == ''
        assert list(reasons(report)) == ['conv3']


def test_run_sees_what_names_hide():
    report = convert_to_micro_batch(Undecided(), dry_run=True)
    assert 'conv1' in changed(report)  # judged by names, and said so
    how = {e.name: e.reason for e in report.changed}
    assert how['conv1'] == 'judged by names'
    inputs = torch.randn(1, 3, 4, 4)
    report = convert_to_micro_batch(
        Undecided(), dry_run=True, example_inputs=inputs
    )
    assert changed(report) == ['bn1', 'conv2', 'bn2']
    assert 'its output goes to neg' in reasons(report)['conv1']


@pytest.mark.parametrize(
    'inputs', [torch.ones(1, 3, 4, 4), (torch.ones(1, 3, 4, 4),)]
)
def test_run_leaves_no_trace(inputs):
    net = Undecided()
    net.bn1.eval()
    state = copy.deepcopy(net.state_dict())
    report = convert_to_micro_batch(net, dry_run=True, example_inputs=inputs)
    assert report.changed
    assert net.training and not net.bn1.training and net.bn2.training
    assert all((state[k] == v).all() for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_what_cannot_be_standardized_stays():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    net = nn.Sequential(
        *(nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8)),
        *(Own(8, 8, 1), nn.BatchNorm2d(8)),
        *(nn.ConvTranspose2d(8, 8, 2), nn.BatchNorm2d(8)),
        *(parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8)),
    )
    report = convert_to_micro_batch(net, dry_run=True)
    assert changed(report) == ['1', '3', '5', '7']
    found = reasons(report)
    assert 'one weight' in found['0']
    assert 'of its own kind' in found['2']
    assert 'transposed' in found['4']
    assert 'parametrized' in found['6']
    assert 'no batch normalization' in found['8']
    assert 'does not depend on the batch' in found['9']


def test_normalization_of_vectors_stays():
    net = nn.Sequential(
        nn.Conv1d(3, 8, 1),
        nn.BatchNorm1d(8),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.BatchNorm1d(4),
    )
    for inputs in (None, torch.randn(2, 3, 8)):
        report = convert_to_micro_batch(
            net, dry_run=True, example_inputs=inputs
        )
        assert changed(report) == ['0', '1']
        assert '(N, C)' in reasons(report)['5']


def test_synchronized_normalization_of_vectors_stays():
    """Its type does not tell how many dimensions it is for."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.SyncBatchNorm(8),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.SyncBatchNorm(4),
    )
    report = convert_to_micro_batch(net, dry_run=True)
    assert changed(report) == ['0', '1']
    assert '(N, C)' in reasons(report)['4']


def test_feeding_a_normalization_that_stays():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + x

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Odd(8))
    with pytest.warns(UserWarning, match='forward of its own'):
        convert_to_micro_batch(net)
    assert type(net[0]) is nn.Conv2d and type(net[1]) is Odd


class FrozenOfDETR(nn.Module):
    """That of DETR: buffers only, and eps in the forward code."""

    def __init__(self, n):
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class FrozenOfDetectron2(FrozenOfDETR):
    """That of detectron2, whose state has no num_batches_tracked."""

    eps = 1e-5


class InPlaceABN(FrozenOfDETR):
    """An activation comes with it: no plain Batch Normalization."""

    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x), 0.01)


class AffineChannel(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, n, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, n, 1, 1))

    def forward(self, x):
        return x * self.weight + self.bias


class GDN(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(n))
        self.gamma = nn.Parameter(torch.eye(n))

    def forward(self, x):
        norm = torch.einsum('nchw,dc->ndhw', x.square(), self.gamma)
        return x * (norm + self.beta.view(-1, 1, 1)).rsqrt()


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('kind', [FrozenOfDETR, FrozenOfDetectron2])
def test_frozen_normalization_of_another_library(kind, device):
    """Converted as torchvision's is: it computes what BN does."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), kind(8)).to(device)
    weight = net[1].weight
    net, report = convert_to_micro_batch(net, return_report=True)
    assert changed(report) == ['0', '1'] and not report.left
    assert isinstance(net[0], ConvWS) and isinstance(net[1], BCN)
    assert device == 'meta' or torch.equal(net[1].batch_weight, weight)


@pytest.mark.parametrize(
    'norm',
    [
        InPlaceABN(8),
        AffineChannel(8),
        GDN(8),
        nn.LocalResponseNorm(4),
        nn.InstanceNorm2d(8),
        nn.RMSNorm([8, 5, 5]),
        timm.layers.LayerNorm2d(8),
        timm.layers.RmsNorm2d(8),
        timm.layers.GroupNormAct(8, 2),
        timm.layers.EvoNorm2dB0(8),
        timm.layers.EvoNorm2dS0(8),
        timm.layers.FilterResponseNormTlu2d(8),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_normalization_that_stays_is_named(norm):
    net = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
    )
    report = convert_to_micro_batch(net, dry_run=True)
    assert changed(report) == ['3', '4']
    assert list(reasons(report)) == ['0', '1']
    assert reasons(report)['1']


def test_frozen_normalization_of_timm_keeps_its_activation():
    net = nn.Sequential(timm.layers.FrozenBatchNormAct2d(8))
    convert_to_micro_batch(net)
    assert isinstance(net[0].norm, BCN) and isinstance(net[0].act, nn.ReLU)


def test_what_only_sounds_like_a_normalization_is_not_named():
    class NormReLU(nn.Sequential):
        pass

    class NormalHead(nn.Module):
        pass

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        NormReLU(nn.BatchNorm2d(8), nn.PReLU(8)),
        NormalHead(),
        parametrizations.weight_norm(nn.Linear(8, 8)),
    )
    report = convert_to_micro_batch(net, dry_run=True)
    assert changed(report) == ['0', '1.0'] and not report.left


# What is kept ---------------------------------------------------------------


def test_parameters_of_convolutions_are_the_same_objects():
    net = conv_bn(dilation=2, padding=1, padding_mode='reflect', bias=False)
    weight = net[0].weight
    optimizer = torch.optim.SGD([weight], 1.0)
    old = copy.deepcopy(net[0])
    convert_to_micro_batch(net)
    assert net[0].weight is weight and net[0].bias is None
    assert (net[0].dilation, net[0].padding_mode) == ((2, 2), 'reflect')
    net(torch.randn(1, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, old.weight)
    x = torch.randn(1, 3, 16, 16)
    plain = nn.utils.stateless.functional_call(
        old, dict(weight=net[0].standardized_weight()), (x,)
    )
    torch.testing.assert_close(net[0](x), plain)


def test_batch_part_takes_what_was_learned():
    net = conv_bn()
    norm = net[1]
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    state = copy.deepcopy(norm.state_dict())
    convert_to_micro_batch(net)
    assert torch.equal(net[1].batch_weight, state['weight'])
    assert torch.equal(net[1].batch_bias, state['bias'])
    assert (net[1].weight == 1).all() and (net[1].bias == 0).all()
    assert net[1].eps == norm.eps


def test_estimates_follow_the_standardized_filters():
    """Statistics measured before stay those of the layer's output."""
    torch.manual_seed(0)
    net = conv_bn().double()
    with torch.no_grad():  # filters of zero mean: WS only scales them
        net[0].weight -= net[0].weight.mean((1, 2, 3), keepdim=True)
        net[0].weight *= torch.rand(64, 1, 1, 1).double() + 0.1
    x = torch.randn(8, 3, 16, 16).double()
    net[1].momentum = 1.0
    net(x)
    convert_to_micro_batch(net)
    y = net[0](x)
    torch.testing.assert_close(net[1].running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, y.var((0, 2, 3)))


def test_estimates_of_a_new_network_stay_new():
    net = convert_to_micro_batch(conv_bn())
    assert (net[1].running_mean == 0).all() and (net[1].running_var == 1).all()


def test_without_affine_or_statistics():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    )
    net[3].weight.data.fill_(3)
    convert_to_micro_batch(net)
    assert all(isinstance(net[i], BCN) for i in (1, 3, 5))
    assert not any(p.requires_grad for p in net[1].parameters())
    assert (net[3].batch_weight == 3).all()
    assert net[3].weight.requires_grad


def test_scale_of_zero_becomes_the_output_scale():
    """Else the batch part has gradients of 1 / sqrt(eps)."""
    net = timm.create_model('resnet18')  # starts with its blocks at 0
    assert (net.layer1[0].bn2.weight == 0).all()
    convert_to_micro_batch(net)
    norm = net.layer1[0].bn2
    assert (norm.weight == 0).all() and (norm.batch_weight == 1).all()
    net(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert norm.batch_weight.grad.abs().max() == 0
    assert norm.weight.grad.abs().max() > 0


def test_device_dtype_mode_and_requires_grad():
    net = conv_bn(device='meta', dtype=torch.float16)
    net[1].to('meta', torch.float16).eval()
    net[1].requires_grad_(False)
    convert_to_micro_batch(net)
    for tensor in (net[0].weight, net[1].batch_weight):
        assert tensor.is_meta and tensor.dtype == torch.float16
    assert net[1].running_mean.is_meta  # in float32, as in any model
    assert net[0].training and not net[1].training
    assert not net[1].weight.requires_grad and net[0].weight.requires_grad


def test_hooks_move_and_can_be_removed():
    net = conv_bn()
    called = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
        for i, layer in enumerate(net)
    ]
    handles.append(
        net[1].register_forward_pre_hook(lambda *_: called.append('pre'))
    )
    convert_to_micro_batch(net)
    net(torch.randn(1, 3, 8, 8))
    assert called == [0, 'pre', 1]
    for handle in handles:
        handle.remove()
    net(torch.randn(1, 3, 8, 8))
    assert len(called) == 3


def test_shared_layers_stay_shared():
    block = conv_bn()
    net = nn.ModuleDict(dict(a=block, b=block, norm=block[1]))
    convert_to_micro_batch(net)
    assert net['a'] is net['b'] and net['norm'] is net['a'][1]
    assert isinstance(net['norm'], BCN)


def test_activation_of_timm_stays():
    net = timm.create_model('efficientnet_b0').eval()
    norm = net.bn1
    convert_to_micro_batch(net)
    assert isinstance(net.bn1.norm, BCN) and net.bn1.act is norm.act
    assert not net.bn1.norm.training and net.bn1.norm.eps == norm.eps
    x = torch.randn(1, 32, 8, 8)
    torch.testing.assert_close(net.bn1(x), nn.functional.silu(net.bn1.norm(x)))


# Whole networks -------------------------------------------------------------


def image(size=64):
    return torch.randn(1, 3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, norms, plain',
    [
        ('resnet50', 53, 0),
        ('mobilenet_v3_small', 34, 18),  # two in each squeeze-excitation
        ('densenet121', 121, 0),
    ],
)
def test_torchvision_classification(name, norms, plain):
    net = torchvision.models.get_model(name)
    net, report = convert_to_micro_batch(
        net, example_inputs=image(), return_report=True
    )
    kinds = [type(m) for m in net.modules()]
    assert kinds.count(BCN) == norms
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.Conv2d) == plain
    assert str(report).count('ConvWS(') == kinds.count(ConvWS)
    train_one_step(net, lambda m: m(image()).square().mean())


def test_densenet_without_a_run():
    """A concatenation is between: only the direct ones are standardized."""
    net = torchvision.models.DenseNet(8, (2, 2), 16)
    report = convert_to_micro_batch(net, dry_run=True)
    traced = {e.name for e in report.changed if 'Conv2d' in e.before}
    assert 'features.denseblock1.denselayer1.conv1' in traced
    assert 'features.denseblock1.denselayer1.conv2' not in traced
    report = convert_to_micro_batch(net, dry_run=True, example_inputs=image())
    seen = {e.name for e in report.changed if 'Conv2d' in e.before}
    assert traced < seen and not any(
        'Conv2d' in entry.before for entry in report.left
    )


@pytest.mark.slow
def test_torchvision_segmentation():
    net = segmentation.deeplabv3_resnet50(weights_backbone=None, aux_loss=True)
    convert_to_micro_batch(net)
    assert isinstance(net.classifier[0].convs[4][2], BCN)
    assert isinstance(net.classifier[0].convs[4][1], ConvWS)
    assert type(net.classifier[4]) is nn.Conv2d
    assert type(net.aux_classifier[4]) is nn.Conv2d
    # One image: its pooled branch has a single value per channel.
    train_one_step(
        net, lambda m: sum(y.square().mean() for y in m(image()).values())
    )


@pytest.mark.slow
def test_torchvision_detection():
    net = detection.maskrcnn_resnet50_fpn_v2(
        weights_backbone=None, min_size=64, max_size=64
    )
    convert_to_micro_batch(net)
    kinds = [type(m) for m in net.modules()]
    assert nn.BatchNorm2d not in kinds
    assert isinstance(net.backbone.fpn.inner_blocks[0][0], ConvWS)
    for output in (
        net.rpn.head.cls_logits,
        net.rpn.head.conv[0][0],
        net.roi_heads.mask_predictor.mask_fcn_logits,
    ):
        assert type(output) is nn.Conv2d
    target = dict(
        boxes=torch.tensor([[10.0, 10.0, 50.0, 40.0]]),
        labels=torch.tensor([1]),
        masks=torch.ones(1, 64, 64, dtype=torch.uint8),
    )
    train_one_step(
        net, lambda m: sum(m([torch.rand(3, 64, 64)], [target]).values())
    )


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv3_small_050'])
def test_timm(name):
    net = timm.create_model(name)
    convert_to_micro_batch(net)
    assert not any(type(m) is nn.BatchNorm2d for m in net.modules())
    train_one_step(net, lambda m: m(image(32)).square().mean())


def test_mmpretrain_model():
    from mmpretrain.models import build_classifier

    net = build_classifier(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='mmpretrain.ResNet', depth=18),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(
                type='mmpretrain.LinearClsHead', num_classes=4, in_channels=512
            ),
        )
    )
    _, report = convert_to_micro_batch(net, return_report=True)
    assert len(report.changed) == 40 and not report.left


# Reports and errors ---------------------------------------------------------


def test_report_is_a_table():
    net = nn.Sequential(*conv_bn(), nn.Conv2d(64, 2, 1))
    lines = str(convert_to_micro_batch(net, dry_run=True)).splitlines()
    assert lines[0] == 'changed (2):'
    assert lines[1].split() == (
        '0 Conv2d(3, 64, 3x3) -> ConvWS(3, 64, 3x3) traced'.split()
    )
    assert lines[3] == 'left as they are (1):'
    assert lines[4].endswith('no batch normalization is seen to follow')


def test_converted_twice():
    net = convert_to_micro_batch(conv_bn())
    before = list(net)
    with pytest.warns(UserWarning, match='nothing to convert'):
        _, report = convert_to_micro_batch(net, return_report=True)
    assert list(net) == before
    assert reasons(report)['1'] == 'made for micro-batches already'
    assert reasons(report)['0'] == 'standardizes already'


def test_nothing_to_convert_is_said():
    with pytest.warns(UserWarning, match='nothing to convert'):
        convert_to_micro_batch(nn.Linear(2, 2))


@pytest.mark.parametrize(
    'arguments, error, match',
    [
        (dict(module=dict(type='ResNet')), TypeError, 'micro_batch_model'),
        (dict(module=3), TypeError, 'torch.nn.Module, got int'),
        (dict(norm_cfg='BCN'), TypeError, 'norm_cfg must be a dict'),
        (dict(norm_cfg=dict(num_groups=8)), ValueError, 'type=None'),
        (dict(norm_cfg=dict(type='BCM')), ValueError, "type='BCM'"),
        (dict(norm_cfg=dict(type='ReLU')), ValueError, "type='ReLU'"),
        (dict(conv_cfg=dict(type='ConvW')), ValueError, "type='ConvW'"),
        (dict(images_per_gpu=0), ValueError, 'images_per_gpu'),
        (dict(images_per_gpu=32), ValueError, 'images_per_update'),
        (dict(example_inputs=torch.ones(2)), ValueError, 'does not run'),
    ],
)
def test_wrong_arguments(arguments, error, match):
    net = conv_bn()
    with pytest.raises(error, match=match):
        convert_to_micro_batch(**(dict(module=net) | arguments))
    assert type(net[1]) is nn.BatchNorm2d


def test_scripted_and_lazy():
    with pytest.raises(ValueError, match='before torch.jit.script'):
        convert_to_micro_batch(torch.jit.script(conv_bn()))
    net = nn.Sequential(nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d())
    with pytest.warns(UserWarning, match='not yet initialized'):
        convert_to_micro_batch(net)
