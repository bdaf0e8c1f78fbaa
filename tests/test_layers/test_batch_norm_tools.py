"""What tools do to the Batch Normalizations of a network, done to ours."""

import copy

import mmcv.cnn
import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import (
    efficient_conv_bn_eval_control,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune, skip_init
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d

from wsbcn_mm import (
    BCN,
    BGN,
    MABN,
    CenConv,
    ConvCWN,
    ConvWN,
    ConvWS,
    ConvWS1d,
    ConvWS3d,
    SyncBCN,
    convert_to_micro_batch,
    fold_for_inference,
)

NORMS = {
    'BCN': lambda **kw: BCN(8, 4, momentum=0.1, **kw),
    'BCN-annealed': lambda **kw: BCN(8, 4, momentum_annealing=True, **kw),
    'BCN-large': lambda **kw: BCN(8, 4, estimate=False, **kw),
    'SyncBCN': lambda **kw: SyncBCN(8, 4, momentum=0.1, **kw),
    'BGN': lambda **kw: BGN(8, 4, **kw),
    'MABN': lambda **kw: MABN(8, 2, 4, warmup_iters=0, **kw),
}
CONVS = {
    'ConvWS': ConvWS,
    'ConvWN': ConvWN,
    'ConvCWN': ConvCWN,
    'CenConv': CenConv,
}


@pytest.fixture(params=NORMS)
def norm(request):
    return NORMS[request.param]()


def batch(channels=8):
    return torch.randn(2, channels, 5, 5) * 2 + 3


def batch_norms(network):
    return [m for m in network.modules() if isinstance(m, _BatchNorm)]


def state(norm):
    return copy.deepcopy(norm.state_dict())


def same(before, after):
    assert before.keys() == after.keys()
    return all(torch.equal(before[k], after[k]) for k in before)


# --- switches ---------------------------------------------------------------


def test_it_is_what_is_looked_for(norm):
    network = nn.Sequential(ConvWS(3, 8, 3), norm)
    assert batch_norms(network) == [norm]
    assert isinstance(norm, nn.BatchNorm2d)  # EfficientNet's norm_eval
    runs = []
    norm.register_forward_hook(lambda *_: runs.append(1))
    network(batch(3))
    assert runs == [1]


@pytest.mark.parametrize('how', ['eval', 'track_running_stats', 'momentum'])
def test_statistics_stop_and_go_on(norm, how):
    if how == 'momentum' and isinstance(norm, MABN):
        with pytest.raises(RuntimeError, match=r'eval\(\)'):
            norm.momentum = 0
        return
    before, momentum = state(norm), norm.momentum
    if how == 'eval':
        norm.eval()
    else:
        setattr(norm, how, 0)
    norm(batch())
    assert same(before, state(norm))
    if how == 'eval':
        norm.train()
    else:
        setattr(norm, how, momentum if how == 'momentum' else True)
    norm(batch())
    assert not same(before, state(norm))


def test_stopped_estimates_are_what_is_normalized_with():
    norm = BCN(8, 4, momentum=0.1)
    norm(batch())
    x = batch()
    wanted = copy.deepcopy(norm).eval()(x)
    norm.track_running_stats = False
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize('names', [['weight', 'bias'], None])
def test_frozen_parameters_stay(norm, names):
    for layer in batch_norms(nn.Sequential(norm)):
        layer.eval()
        for name, parameter in layer.named_parameters():
            if names is None or name in names:
                parameter.requires_grad = False
    before = state(norm)
    x = batch().requires_grad_()
    norm(x).square().sum().backward()
    assert x.grad is not None
    torch.optim.SGD(norm.parameters(), lr=1.0).step()
    assert same(before, state(norm))


def test_the_running_statistics_are_forgotten(norm):
    new = state(norm)
    norm(batch())
    norm.reset_running_stats()
    assert same(new, state(norm))


def test_statistics_may_not_be_removed(norm):
    from torch.func import replace_all_batch_norm_modules_

    with pytest.raises(RuntimeError, match='is being removed'):
        replace_all_batch_norm_modules_(nn.Sequential(norm))


# --- statistics computed anew ------------------------------------------------


def test_update_bn_averages_the_data(norm):
    loader = [batch() for _ in range(20)]
    network = nn.Sequential(norm)
    if isinstance(norm, MABN):
        with pytest.raises(RuntimeError, match='track_running_stats'):
            update_bn(loader, network)
        return
    momentum = norm.momentum
    network(batch() + 100)
    update_bn(loader, network)
    assert norm.momentum == momentum and norm.num_batches_tracked == 20
    wanted = torch.cat(loader).mean((0, 2, 3))
    if isinstance(norm, BGN):
        wanted = wanted.view(4, 2).mean(1)
    torch.testing.assert_close(norm.running_mean, wanted)


def test_precise_bn_works_or_is_refused(norm):
    hooks = pytest.importorskip('mmpretrain.engine.hooks.precise_bn_hook')

    class Network(nn.Sequential):
        def data_preprocessor(self, data, training):
            return dict(input=data)

    data = torch.randn(6, 8, 4, 4) + 3
    network = Network(norm)
    loader = DataLoader(data, batch_size=2)
    if isinstance(norm, BGN) or not getattr(norm, 'estimate', True):
        hooks.update_bn_stats(network, loader)
        assert (norm.running_mean - 3).abs().max() < 0.5
    else:
        with pytest.raises(RuntimeError, match='momentum is being set'):
            hooks.update_bn_stats(network, loader)


# --- another layer in its place ----------------------------------------------


@pytest.mark.parametrize(
    'convert',
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda network: convert_sync_batchnorm(network, 'torch'),
    ],  # mmcv's wants processes: see test_sync_bcn.py
    ids=['torch', 'mmengine'],
)
def test_converted_it_is_itself_synchronized(norm, convert):
    before = state(norm)
    network = convert(nn.Sequential(nn.Sequential(norm), nn.BatchNorm2d(8)))
    assert network[0][0] is norm and norm.is_synchronized
    assert same(before, state(norm))
    assert 'SyncBatchNorm' in type(network[1]).__name__


def freeze_batch_norm_2d(module):
    """As timm does it."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.weight.data = module.weight.data.clone()
        frozen.running_var.data = module.running_var.data
        return frozen
    for name, child in module.named_children():
        new = freeze_batch_norm_2d(child)
        if new is not child:
            module.add_module(name, new)
    return module


def test_a_frozen_layer_in_its_place_freezes_it(norm):
    network = freeze_batch_norm_2d(nn.Sequential(norm, nn.BatchNorm2d(8)))
    assert network[0] is norm and isinstance(network[1], FrozenBatchNorm2d)
    network.train()
    before, x = state(norm), batch()
    wanted = norm(x)
    torch.testing.assert_close(norm(x), wanted)
    assert same(before, state(norm))
    assert not any(p.requires_grad for p in norm.parameters())


def test_a_stranger_with_its_tensors_is_refused(norm):
    network = nn.Sequential(norm)
    other = nn.BatchNorm2d(8)
    other.weight = norm.weight
    with pytest.raises(RuntimeError, match='in its place'):
        network.add_module('0', other)


def test_a_layer_of_its_own_may_take_the_place(norm):
    network = nn.Sequential(norm)
    for new in (nn.BatchNorm2d(8), nn.Identity(), nn.Sequential(norm), None):
        network.add_module('0', norm)
        network.add_module('0', new)
        assert network._modules['0'] is new


# --- fused into a convolution -----------------------------------------------


def pair(conv=ConvWS, norm=None):
    norm = norm or nn.BatchNorm2d(8)
    network = nn.Sequential(conv(3, 8, 3, bias=True), norm).eval()
    norm.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize('conv', [nn.Conv2d, *CONVS.values()])
@pytest.mark.parametrize('name', ['BN', *NORMS])
def test_fusion_by_others_is_refused(conv, name):
    if conv is nn.Conv2d and name == 'BN':
        return  # is theirs
    network = pair(conv, nn.BatchNorm2d(8) if name == 'BN' else NORMS[name]())
    x = batch(3)
    wanted = network(x)
    for fuse in (
        lambda network: fuse_conv_bn_eval(*network),
        mmcv.cnn.fuse_conv_bn,
    ):
        with pytest.raises(RuntimeError, match='fold_for_inference'):
            fuse(copy.deepcopy(network))
    torch.testing.assert_close(network(x), wanted)


@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), dict(type='BCN')])
def test_efficient_conv_bn_eval_is_refused(norm_cfg):
    module = mmcv.cnn.ConvModule(
        3,
        8,
        3,
        conv_cfg=dict(type='ConvWS'),
        norm_cfg=norm_cfg,
        efficient_conv_bn_eval=True,
    ).eval()
    with pytest.raises(RuntimeError, match='fold_for_inference'):
        module(batch(3))
    for mode in (True, False):
        conv, norm = pair().train(mode)
        with pytest.raises(RuntimeError, match='fold_for_inference'):
            efficient_conv_bn_eval_control(norm, conv, batch(3))


def test_what_is_no_fusion_is_no_fault():
    conv = ConvWS(3, 8, 3)
    prune.l1_unstructured(conv, 'weight', 0.3)
    conv(batch(3)).sum().backward()
    assert conv.weight_orig.grad is not None
    prune.remove(conv, 'weight')
    parametrize.register_parametrization(conv, 'weight', nn.Identity())
    conv(batch(3)).sum().backward()
    conv = ConvWS(3, 8, 3)
    penalty = conv.weight.square().sum()
    penalty.backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize('name', ['RepVGG', 'MobileOne', 'RepLKNet'])
def test_reparameterization_is_refused(name):
    backbones = pytest.importorskip('mmpretrain.models.backbones')
    arch = dict(
        RepVGG='A0',
        MobileOne='s0',
        RepLKNet=dict(
            large_kernel_sizes=[7] * 4,
            layers=[1] * 4,
            channels=[8] * 4,
            small_kernel=3,
            dw_ratio=1,
        ),
    )[name]
    network = getattr(backbones, name)(arch=arch, out_indices=(1,))
    network.eval()
    convert_to_micro_batch(network, norm_cfg=dict(type='BN'))
    assert any(isinstance(m, ConvWS) for m in network.modules())
    for module in batch_norms(network):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = network(x)[-1]
        with pytest.raises(RuntimeError, match='fold_for_inference'):
            network.switch_to_deploy()
        fold_for_inference(network, example_inputs=x)
        torch.testing.assert_close(network(x)[-1], wanted)


# --- low precision -----------------------------------------------------------


def cast_data(norm):
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16()
    return norm


def assign(norm):
    low = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in norm.state_dict().items()
    }
    norm.load_state_dict(low, assign=True)
    return norm


@pytest.mark.parametrize(
    'lower',
    [
        lambda norm: norm.bfloat16(),
        lambda norm: norm.half().bfloat16(),
        lambda norm: norm.to(torch.bfloat16),
        lambda norm: norm.double().bfloat16(),
        cast_data,
        assign,
    ],
    ids=['bfloat16', 'half', 'to', 'double', 'data', 'assign'],
)
def test_small_updates_arrive_in_a_low_precision_model(norm, lower):
    norm = type(norm)(
        **(
            dict(num_features=4, batch_size=2, momentum=0.997)
            if isinstance(norm, MABN)
            else dict(num_features=4, num_groups=2, momentum=0.003)
        )
    )
    norm = lower(norm)
    x = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1).expand(2, 4, 2, 4) * 2 + 3
    with torch.no_grad():
        for _ in range(1500):
            norm(x.bfloat16())
    mean, var = (norm.running_mean, norm.running_var)
    if isinstance(norm, MABN):
        assert (var - 13).abs().max() < 0.6
    else:
        assert (mean - 3).abs().max() < 0.1
        bessel = 16 / 15 if isinstance(norm, SyncBCN) else 1
        assert (var - 4).abs().max() < 0.2 * bessel
    assert norm.weight.dtype == torch.bfloat16
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_made_in_low_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        norms = [make() for make in NORMS.values()]
    finally:
        torch.set_default_dtype(torch.float32)
    norms += [make(dtype=torch.float16) for make in NORMS.values()]
    for norm in norms:
        assert norm.running_var.dtype == torch.float32
        assert norm.weight.dtype in (torch.bfloat16, torch.float16)


# --- made without data -------------------------------------------------------


@pytest.mark.parametrize(
    ('layer', 'arguments'),
    [
        *((conv, (3, 8, 3)) for conv in CONVS.values()),
        (ConvWS1d, (3, 8, 3)),
        (ConvWS3d, (3, 8, 3)),
        (BCN, (8, 4)),
        (SyncBCN, (8, 4)),
        (BGN, (8, 4)),
        (MABN, (8, 2)),
    ],
)
def test_skip_init(layer, arguments):
    made = skip_init(layer, *arguments)
    assert not any(t.is_meta for t in (*made.parameters(), *made.buffers()))
    assert isinstance(made, layer)


@pytest.mark.parametrize('device', ['cpu', torch.device('meta'), None])
def test_a_convolution_takes_a_device(device):
    conv = ConvWS(3, 8, 3, device=device, dtype=torch.float64)
    assert conv.weight.device.type == str(device or 'cpu')
    assert conv.weight.dtype == torch.float64
