import copy

import pytest
import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import digit_version
from torch import nn

from wsbcn_mm import (
    BCN,
    BGN,
    MABN,
    CenConv,
    ConvCWN,
    ConvWN,
    ConvWS,
    SyncBCN,
    fold_for_inference,
)
from wsbcn_mm.stock_layers import NotReplaceable, is_ours


def randomize(module, seed=0):
    """Estimates and affines that no identity could be mistaken for."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        for name, t in [*m._parameters.items(), *m._buffers.items()]:
            if t is None or not t.is_floating_point():
                continue
            norm = isinstance(m, nn.GroupNorm) or hasattr(m, 'running_var')
            if not norm:
                continue
            value = torch.rand(t.shape, generator=generator)
            if 'mean' in name or 'bias' in name:
                value = value - 0.5
            else:
                value = value + 0.5
            t.data.copy_(value)
    return module


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def check(net, *inputs, tolerance=1e-5):
    net.eval()
    before = copy.deepcopy(net.state_dict())
    folded, report = fold_for_inference(net, return_report=True)
    assert not any(is_ours(m) for m in folded.modules())
    assert not any(m._load_state_dict_pre_hooks for m in folded.modules())
    with torch.no_grad():
        for a, b in zip(_flat(folded(*inputs)), _flat(net(*inputs))):
            assert relative(a, b) < tolerance
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    return folded, report


def _flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _flat(v)]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('conv', [nn.Conv2d, ConvWS])
@pytest.mark.parametrize('affine', ['group', 'channel'])
def test_bcn(conv, bias, affine):
    net = nn.Sequential(
        conv(3, 8, 3, padding=1, bias=bias),
        BCN(8, 4, eps=1e-3, channel_affine=affine),
    )
    folded, report = check(randomize(net), torch.randn(2, 3, 9, 9))
    assert [type(m) for m in folded] == [nn.Conv2d, nn.GroupNorm]
    assert report.folded == {'1': '0'} and not report.kept


@pytest.mark.parametrize('dims', [1, 3])
def test_other_dimensions(dims):
    import wsbcn_mm

    conv = {1: wsbcn_mm.ConvWS1d, 3: wsbcn_mm.ConvWS3d}[dims]
    net = nn.Sequential(conv(3, 8, 3), BCN(8, 4))
    folded, _ = check(randomize(net), torch.randn(2, 3, *(5,) * dims))
    assert type(folded[0]) is {1: nn.Conv1d, 3: nn.Conv3d}[dims]


def test_bn_after_ws_folds_completely():
    net = nn.Sequential(ConvWS(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    folded, _ = check(randomize(net), torch.randn(2, 3, 9, 9))
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity]


@pytest.mark.parametrize('norm', [MABN(8, 1, 4), BGN(8, 2)])
def test_mabn_and_bgn_fold_completely(norm):
    net = nn.Sequential(CenConv(3, 8, 3, bias=False), norm)
    folded, _ = check(randomize(net), torch.randn(2, 3, 9, 9))
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity]


@pytest.mark.parametrize('conv', [CenConv, ConvWN, ConvCWN])
def test_other_functions_of_weights(conv):
    net = nn.Sequential(conv(3, 8, 3, padding=1, groups=1), BCN(8, 4))
    folded, _ = check(randomize(net), torch.randn(2, 3, 9, 9))
    assert type(folded[0]) is nn.Conv2d


def test_bgn_that_splits_channels_is_refused_before_any_change():
    net = nn.Sequential(ConvWS(3, 8, 1), BGN(8, 3)).train()
    with pytest.raises(NotReplaceable, match='can replace 1: .* split'):
        fold_for_inference(net, inplace=True)
    assert [type(m) for m in net] == [ConvWS, BGN] and net.training


def test_a_weight_that_is_used_past_its_layer_is_refused():
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + nn.functional.conv2d(x, self[0].weight)

    net = Net(ConvWS(3, 8, 1), BCN(8))
    for outer in (net, nn.Sequential(net)):
        with pytest.raises(NotReplaceable, match=r'the weight of .*0 itself'):
            fold_for_inference(outer, inplace=True)
        assert isinstance(net[0], ConvWS) and net.training


def test_a_weight_that_only_training_uses_past_its_layer_folds():
    class Net(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return x + self[0].weight.norm() if self.training else x

    folded = fold_for_inference(Net(ConvWS(3, 8, 1), BCN(8)).train())
    assert type(folded[0]) is nn.Conv2d


class OfOurs(nn.Module):
    """As far as its name says: there is no stock counterpart."""

    __module__ = 'wsbcn_mm.models'


def test_what_has_no_counterpart_is_refused_before_any_change():
    net = nn.Sequential(ConvWS(3, 8, 1), BCN(8), OfOurs())
    with pytest.raises(RuntimeError, match=r'can replace 2 \(OfOurs\)'):
        fold_for_inference(net, inplace=True)
    assert [type(m) for m in net] == [ConvWS, BCN, OfOurs]


def test_gn_after_ws_keeps_its_gn():
    net = nn.Sequential(ConvWS(3, 8, 3, bias=False), nn.GroupNorm(4, 8))
    folded, report = check(randomize(net), torch.randn(2, 3, 9, 9))
    assert [type(m) for m in folded] == [nn.Conv2d, nn.GroupNorm]
    assert report.weights == ['0']


@pytest.mark.parametrize('groups', [1, 2])
def test_transposed_convolution(groups):
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 2, stride=2, groups=groups), BCN(8, 4)
    )
    _, report = check(randomize(net), torch.randn(2, 4, 5, 5))
    assert report.folded


def test_where_no_convolution_feeds_it_the_affine_stays():
    net = nn.Sequential(BCN(4, 2), nn.ReLU(), ConvWS(4, 4, 1), BCN(4, 2))
    folded, report = check(randomize(net), torch.randn(2, 4, 5, 5))
    assert set(report.kept) == {'0'} and set(report.folded) == {'3'}
    assert 'no convolution' in str(report)
    assert [type(m) for m in folded[0]] == [nn.BatchNorm2d, nn.GroupNorm]


@pytest.mark.parametrize('dims', [1, 2, 3])
def test_an_affine_that_stays_has_the_dimensions_of_its_input(dims):
    conv = getattr(nn, f'Conv{dims}d')
    norm = getattr(nn, f'BatchNorm{dims}d')
    # As the convolution before it, whatever else there is in the network,
    net = Residual(conv(3, 8, 3))
    net.other = nn.ConvTranspose2d(3, 8, 3)
    folded, _ = check(randomize(net), torch.randn(2, 3, *(5,) * dims))
    assert type(folded.norm[0]) is norm
    # or as all convolutions, if none is before it.
    net = nn.Sequential(BCN(4, 2), conv(4, 4, 1), MABN(4, 1, 2))
    folded, _ = check(randomize(net), torch.randn(2, 4, *(5,) * dims))
    assert type(folded[0][0]) is norm


class TwoLevels(nn.Module):
    """One convolution, a norm for each level, as in RTMDet."""

    def __init__(self):
        super().__init__()
        self.conv = ConvWS(3, 8, 3)
        self.norms = nn.ModuleList([BCN(8, 4), BCN(8, 4)])

    def forward(self, a, b):
        return self.norms[0](self.conv(a)), self.norms[1](self.conv(b))


class Residual(nn.Module):
    def __init__(self, conv=None):
        super().__init__()
        self.conv = conv or ConvWS(3, 8, 3)
        self.norm = BCN(8, 4)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


@pytest.mark.parametrize('net', [TwoLevels(), Residual()])
def test_a_shared_convolution_is_not_touched(net):
    inputs = [torch.randn(1, 3, 7, 7)] * (1 + isinstance(net, TwoLevels))
    _, report = check(randomize(net), *inputs)
    assert not report.folded and report.kept


class RawOnDemand(nn.Module):
    """What the trace does not see: an argument that is not the default."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = BCN(8, 4)

    def forward(self, x, raw=False):
        return self.conv(x) if raw else self.norm(self.conv(x))


class Outer(nn.Module):
    """Cannot be traced, and uses a convolution of what can be."""

    def __init__(self):
        super().__init__()
        self.inner = RawOnDemand()

    def forward(self, x):
        relu = torch.relu_ if x.sum() > 0 else torch.relu
        return dict(y=[relu(self.inner(x)), self.inner.conv(x)], n=1)


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize(
    'net, right, wrong',
    [
        (RawOnDemand(), lambda x: x, lambda x: dict(x=x, raw=True)),
        (nn.Sequential(Outer()), None, lambda x: (x,)),
    ],
)
def test_an_example_shows_what_tracing_could_not(net, right, wrong, inplace):
    net = randomize(net).eval()
    x = torch.randn(1, 3, 7, 7)
    if right:
        fold_for_inference(net, example_inputs=right(x))
    with pytest.raises(RuntimeError, match=r'differ by .* of the largest'):
        fold_for_inference(net, inplace, example_inputs=wrong(x))
    assert any(type(m) is BCN for m in net.modules())


@pytest.mark.parametrize(
    'dtype', [torch.double, torch.float, torch.half, torch.bfloat16]
)
def test_an_example_in_any_precision(dtype):
    layers = [[ConvWS(8, 8, 3), BCN(8, 4), nn.ReLU(True)] for _ in range(5)]
    net = nn.Sequential(nn.ReLU(True), *sum(layers, []))
    net = randomize(net).to(dtype).train()
    x = torch.randn(1, 8, 17, 17, dtype=dtype)
    before = x.clone()
    folded = fold_for_inference(net, example_inputs=x)
    assert not any(is_ours(m) for m in folded.modules())
    assert torch.equal(x, before)
    assert net.training and not folded.training


def test_an_example_without_anything_to_compare():
    class Labels(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(1)

    net = Labels(ConvWS(3, 8, 3), BCN(8, 4))
    with pytest.raises(ValueError, match='no floating-point tensor'):
        fold_for_inference(net, example_inputs=torch.randn(1, 3, 7, 7))


@pytest.mark.parametrize('dtype', [torch.half, torch.double])
@pytest.mark.parametrize('norm', [BCN(8, 4), MABN(8, 1, 2)])
@pytest.mark.parametrize('conv', [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_of_another_precision(conv, norm, dtype):
    net = nn.Sequential(conv(3, 8, 3).to(dtype), norm)
    x = torch.randn(1, 3, 7, 7, dtype=dtype)
    folded, report = check(randomize(net), x, tolerance=1e-2)
    assert report.folded and folded[0].weight.dtype is dtype
    # GroupNorm's kernels on a GPU take no other precision than its input's.
    assert all(p.dtype is dtype for p in folded.parameters())


class Scaled(nn.Conv2d):
    """Its weight is normalized: a factor folded into it would be lost."""

    def forward(self, x):
        return self._conv_forward(
            x, self.weight / self.weight.norm(), self.bias
        )


def test_an_unknown_convolution_is_tried_and_left_alone():
    net = nn.Sequential(Scaled(3, 8, 3), BCN(8, 4))
    folded, report = check(randomize(net), torch.randn(1, 3, 7, 7))
    assert type(folded[0]) is Scaled and 'no ordinary' in report.kept['1']


def test_spectral_norm_is_left_alone():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    net = nn.Sequential(conv, BCN(8, 4)).eval()
    _, report = check(randomize(net), torch.randn(1, 3, 7, 7))
    assert set(report.kept) == {'1'}


def test_a_layer_alone_and_in_place():
    norm = randomize(BCN(8, 4)).eval()
    x = torch.randn(1, 8, 5, 5)
    assert relative(fold_for_inference(norm)(x), norm(x)) < 1e-5
    net = nn.Sequential(ConvWS(3, 8, 3), BCN(8, 4))
    assert fold_for_inference(net, inplace=True) is net
    assert type(net[0]) is nn.Conv2d


def test_what_is_no_module():
    with pytest.raises(TypeError, match='expected a torch.nn.Module'):
        fold_for_inference('checkpoint.pth')


@pytest.fixture
def resnet18():
    mmdet = pytest.importorskip('mmdet.models')
    return randomize(
        mmdet.ResNet(
            18, norm_cfg=dict(type='BCN'), conv_cfg=dict(type='ConvWS')
        )
    )


def test_mmdet_resnet(resnet18):
    folded, report = check(resnet18, torch.randn(1, 3, 65, 65))
    assert len(report.folded) == 20 and not report.kept
    assert type(folded.layer1[0].bcn1) is nn.GroupNorm


def test_fuse_conv_bn_stops_at_standardized_weights():
    net = nn.Sequential(ConvWS(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    with pytest.raises(RuntimeError, match='fold_for_inference'):
        fuse_conv_bn(randomize(net).eval())
    module = ConvModule(
        3, 8, 3, conv_cfg=dict(type='ConvWS'), norm_cfg=dict(type='BN')
    )
    with pytest.raises(RuntimeError, match='fold_for_inference'):
        fuse_conv_bn(module.eval())
    biased = nn.Sequential(ConvWS(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(RuntimeError, match='fold_for_inference'):
        fuse_conv_bn(randomize(biased).eval())


def test_a_standardized_weight_may_be_replaced():
    conv = ConvWS(3, 8, 3)
    for weight in (conv.weight, torch.rand(8, 3, 3, 3), torch.zeros(8, 27)):
        conv.weight = nn.Parameter(weight.detach().view(8, 3, 3, 3).clone())
        conv.bias = nn.Parameter(torch.ones(8))
    assert not conv.weight.any() and conv.bias.all()


def test_folded_torchscript_and_export():
    net = nn.Sequential(
        ConvWS(3, 8, 3), BCN(8, 4), nn.ReLU(), ConvWS(8, 8, 3), BCN(8, 4)
    )
    folded = fold_for_inference(randomize(net))
    x = torch.randn(1, 3, 9, 9)
    assert relative(torch.jit.script(folded)(x), folded(x)) < 1e-6
    program = torch.export.export(folded, (x,)).module()
    assert relative(program(x), folded(x)) < 1e-6
    # Unfolded, tracing and exporting do what they should as well.
    net.eval()
    with torch.no_grad():
        assert relative(torch.jit.trace(net, x)(x), net(x)) < 1e-6
        program = torch.export.export(net, (x,)).module()
        assert relative(program(x), net(x)) < 1e-6


def export_onnx(net, x, path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    dynamo = digit_version(torch.__version__) >= digit_version('2.5')
    with torch.no_grad():
        torch.onnx.export(net, (x,), str(path), dynamo=dynamo, verbose=False)
        wanted = _flat(net(x))
    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider']
    )
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert relative(torch.from_numpy(a), b) < 1e-4


@pytest.mark.parametrize('folded', [True, False])
def test_onnx(tmp_path, folded):
    net = nn.Sequential(
        ConvWS(3, 8, 3), BCN(8, 4), nn.ReLU(), ConvWS(8, 8, 3), BCN(8, 4)
    )
    net = randomize(net).eval()
    net = fold_for_inference(net) if folded else net
    export_onnx(net, torch.randn(1, 3, 9, 9), tmp_path / 'net.onnx')


LAYERS = {
    'BCN': lambda: BCN(8, 4),
    'BCN-channel': lambda: BCN(8, 4, channel_affine='channel'),
    'BCN-batch': lambda: BCN(8, 4, estimate=False),
    'SyncBCN': lambda: SyncBCN(8, 4),
    'BGN': lambda: BGN(8, 4),
    'MABN': lambda: MABN(8, batch_size=1, simulated_batch_size=16),
    'ConvWS': lambda: ConvWS(8, 8, 3),
    'ConvWN': lambda: ConvWN(8, 8, 3),
    'ConvCWN': lambda: ConvCWN(8, 8, 3),
    'CenConv': lambda: CenConv(8, 8, 3),
}


def _tied(layer):
    """A copy that has the same parameters, not only equal ones."""
    other = copy.deepcopy(layer)
    for name, parameter in list(layer.named_parameters(recurse=False)):
        other.register_parameter(name, parameter)
    return other


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('opset', [11, 17])
@pytest.mark.parametrize(
    'second',
    [copy.deepcopy, _tied, lambda layer: layer],
    ids=['equal', 'tied', 'shared'],
)
@pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)
def test_torchscript_onnx_of_equal_layers(make, second, opset, tmp_path):
    """The exporter writes their weights once, and onnxruntime lost them."""
    onnxruntime = pytest.importorskip('onnxruntime')
    layer = make()
    net = nn.Sequential(layer, nn.ReLU(), second(layer)).eval()
    path = str(tmp_path / 'net.onnx')
    torch.onnx.export(
        net,
        (torch.randn(2, 8, 9, 9),),
        path,
        opset_version=opset,
        input_names=['x'],
        dynamic_axes={'x': {0: 'batch'}},
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(3, 8, 9, 9)
    (y,) = session.run(None, {'x': x.numpy()})
    with torch.no_grad():
        assert relative(torch.from_numpy(y), net(x)) < 1e-4


@pytest.mark.filterwarnings('ignore')
def test_torchscript_onnx_of_half_precision(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    net = nn.Sequential(ConvWS(8, 8, 3), BCN(8, 4), nn.ReLU(), BCN(8, 4))
    net = net.half().eval()
    x = torch.randn(2, 8, 9, 9).half()
    path = str(tmp_path / 'net.onnx')
    torch.onnx.export(
        net, (x,), path, opset_version=17, input_names=['x'], dynamo=False
    )
    (y,) = onnxruntime.InferenceSession(path).run(None, {'x': x.numpy()})
    with torch.no_grad():
        assert relative(torch.from_numpy(y).float(), net(x).float()) < 5e-3


MICRO_BATCH = dict(
    norm_cfg=dict(type='BCN', requires_grad=True),
    conv_cfg=dict(type='ConvWS'),
)


def mask_rcnn():
    import os.path as osp

    import mmdet
    from mmengine.config import Config

    configs = osp.join(osp.dirname(mmdet.__file__), '.mim', 'configs')
    cfg = Config.fromfile(
        osp.join(configs, 'gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py')
    ).model
    for part in (
        cfg.backbone,
        cfg.neck,
        cfg.roi_head.bbox_head,
        cfg.roi_head.mask_head,
    ):
        part.update(MICRO_BATCH)
    cfg.backbone.init_cfg = None
    init_default_scope('mmdet')
    return MODELS.build(cfg)


def deeplabv3plus():
    import os.path as osp

    import mmseg
    from mmengine.config import Config

    configs = osp.join(osp.dirname(mmseg.__file__), '.mim', 'configs')
    cfg = Config.fromfile(
        osp.join(
            configs,
            'deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_'
            'cityscapes-512x1024.py',
        )
    ).model
    cfg.pretrained = None
    for part in (cfg.backbone, cfg.decode_head, cfg.auxiliary_head):
        part.update(MICRO_BATCH)
    init_default_scope('mmseg')
    return MODELS.build(cfg)


def as_if_trained(net):
    """Small residual branches, as zero-initialized ones become.

    With large ones a random ResNet-50 magnifies rounding: in float32 it is
    4e-5 away from its own float64 output, folded or not.
    """
    for block in randomize(net).modules():
        if hasattr(block, 'norm3'):
            block.norm3.weight.data.mul_(0.2)
    return net.eval()


@pytest.mark.slow
def test_full_mask_rcnn():
    pytest.importorskip('mmdet')
    torch.manual_seed(0)
    net = as_if_trained(mask_rcnn())
    x = torch.randn(1, 3, 128, 160)
    folded, report = fold_for_inference(net, return_report=True)
    assert not report.kept and len(report.folded) == 69
    assert not any(is_ours(m) for m in folded.modules())
    rois = torch.tensor([[0, 8.0, 8.0, 96.0, 96.0]])
    with torch.no_grad():
        outputs = []
        for model in (folded, net):
            features = model.extract_feat(x)
            pooled = model.roi_head._bbox_forward(features, rois)
            mask = model.roi_head._mask_forward(features, rois)
            outputs.append(
                [
                    *features,
                    *_flat(model.rpn_head(features)),
                    pooled['cls_score'],
                    pooled['bbox_pred'],
                    mask['mask_preds'],
                ]
            )
    for a, b in zip(*outputs):
        assert relative(a, b) < 1e-5


@pytest.mark.slow
def test_backbone_to_onnx(tmp_path):
    models = pytest.importorskip('mmdet.models')
    backbone = models.ResNet(
        18, norm_cfg=dict(type='BCN'), conv_cfg=dict(type='ConvWS')
    )
    backbone.train(False)
    folded = fold_for_inference(randomize(backbone))
    x = torch.randn(1, 3, 64, 64)
    export_onnx(folded, x, tmp_path / 'backbone.onnx')
    with torch.no_grad():
        traced = torch.jit.trace(folded, x)(x)
        program = torch.export.export(folded, (x,)).module()(x)
        for wanted, *others in zip(folded(x), traced, program):
            assert all(relative(o, wanted) < 1e-5 for o in others)


@pytest.mark.slow
def test_full_deeplabv3plus(tmp_path):
    pytest.importorskip('mmseg')
    torch.manual_seed(0)
    net = as_if_trained(deeplabv3plus())
    x = torch.randn(1, 3, 64, 96)
    folded, report = fold_for_inference(net, return_report=True)
    assert not report.kept
    with torch.no_grad():
        a, b = folded(x, mode='tensor'), net(x, mode='tensor')
    assert relative(a, b) < 1e-5
    export_onnx(folded, x, tmp_path / 'deeplab.onnx')
