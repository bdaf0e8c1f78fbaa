import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import save_checkpoint
from mmengine.runner.checkpoint import get_state_dict

from wsbcn_mm.engine import stock
from wsbcn_mm.engine.checkpoint import read_config
from wsbcn_mm.engine.stock import NotExpressible, stock_model

ROOT = Path(__file__).parents[2]
FOLD = ROOT / 'tools' / 'deploy' / 'fold.py'

MASK_RCNN = """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, norm_cfg=dict(type='{norm}'{args}), pretrained=False
)
model.backbone.update(depth=18, base_channels=8)
model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
model.rpn_head.update(in_channels=16, feat_channels=16)
for head in (model.roi_head.bbox_head, model.roi_head.mask_head):
    head.update(in_channels=16, conv_out_channels=16)
model.roi_head.bbox_head.fc_out_channels = 16
norm_cfg = dict(type='{norm}')
model.roi_head.bbox_roi_extractor.out_channels = 16
model.roi_head.mask_roi_extractor.out_channels = 16
custom_hooks = [
    dict(type='CalibrateEstimatesHook'),
    dict(type='NumClassCheckHook'),
]
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
"""

DEEPLAB = """
_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-{}.py'

from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model,
    norm_cfg=dict(type='BCN', num_groups=4),
    pretrained=False,
)
model.backbone.update(depth=18, base_channels=8, stem_channels=8)
model.decode_head.update(
    in_channels=64, channels=8, c1_in_channels=8, c1_channels=4
)
model.auxiliary_head.update(in_channels=32, channels=8)
model.data_preprocessor.pop('size')
""".format('512x1024')


def randomize(model):
    """No estimate or affine that an identity could be mistaken for."""
    for module in model.modules():
        for name, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None and t.is_floating_point() and t.dim() == 1:
                centered = 'mean' in name or 'bias' in name
                t.data = torch.rand_like(t) + (-0.5 if centered else 0.5)
    model.eval()  # returns nothing, for some backbones
    return model


def trained(tmp_path, text):
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'model.pth'
    config.write_text(text)
    model = randomize(MODELS.build(read_config(str(config)).model))
    state = get_state_dict(model)
    # What a Runner's checkpoint holds besides, which no plain load allows.
    hub = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))
    save_checkpoint(
        dict(state_dict=state, meta={}, message_hub=hub), str(checkpoint)
    )
    return model, config, checkpoint


def fold(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['fold.py', *map(str, arguments)])
    runpy.run_path(str(FOLD), run_name='__main__')


STOCK = """
import sys

sys.modules['wsbcn_mm'] = None  # importing it fails from here on
import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.apis import init_detector

config, checkpoint, inputs, outputs = sys.argv[1:]
model = init_detector(config, checkpoint, device='cpu', palette='coco')
x = torch.load(inputs)
with torch.no_grad():
    plain = model.extract_feat(x)
    fused = fuse_conv_bn(model).extract_feat(x)
names = {type(m).__name__ for m in model.modules()}
assert 'BatchNorm2d' not in names, 'fuse_conv_bn left something'
torch.save([plain, fused], outputs)
"""


def load_without_us(tmp_path, x, code):
    script = tmp_path / 'stock.py'
    script.write_text(code)
    torch.save(x, tmp_path / 'x.pt')
    files = [tmp_path / n for n in ('o.py', 'o.pth', 'x.pt', 'y.pt')]
    result = subprocess.run(
        [sys.executable, script, *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert 'unexpected key' not in result.stdout + result.stderr
    assert 'missing keys' not in result.stdout + result.stderr
    return torch.load(tmp_path / 'y.pt')


def check_outputs(tmp_path, model):
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        wanted = model.extract_feat(x)
    for outputs in load_without_us(tmp_path, x, STOCK):
        for a, b in zip(outputs, wanted):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()


def assert_same_features(stock, model):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(stock.extract_feat(x), model.extract_feat(x)):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.slow
def test_stock_mmdet_loads_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmdet')
    text = MASK_RCNN.format(norm='BCN', args=', num_groups=4')
    model, config, checkpoint = trained(tmp_path, text)
    fold(monkeypatch, config, checkpoint, tmp_path / 'o')
    assert 'Outputs differ by at most' in capsys.readouterr().out
    written = (tmp_path / 'o.py').read_text()
    for word in ('wsbcn', 'BCN', 'ConvWS', 'Calibrate'):
        assert word not in written
    assert 'NumClassCheckHook' in written
    check_outputs(tmp_path, model)


@pytest.mark.parametrize(
    'norm, args, conv',
    [
        ('SyncBCN', ', num_groups=4', 'ConvWS'),
        ('MABN', ', batch_size=1, simulated_batch_size=4', 'CenConv'),
        ('BN', '', 'ConvWS'),
        ('GN', ', num_groups=4', 'ConvWS'),
        ('BCN', ", num_groups=4, channel_affine='channel'", 'Conv2d'),
    ],
)
def test_other_normalizations(tmp_path, norm, args, conv):
    pytest.importorskip('mmdet')
    text = MASK_RCNN.format(norm=norm, args=args).replace(
        'pretrained=False', f"pretrained=False, conv_cfg=dict(type='{conv}')"
    )
    model, config, _ = trained(tmp_path, text)
    cfg, stock = stock_model(read_config(str(config)), model)
    assert_same_features(stock, model)
    assert not {'BCN', 'MABN', 'ConvWS'} & set(cfg.pretty_text.split("'"))


def test_a_bias_finds_a_place(tmp_path):
    """Stock ResNets have none, and the BatchNorm's mean can take it."""
    pytest.importorskip('mmdet')
    text = MASK_RCNN.format(norm='BCN', args=', num_groups=4')
    model, config, _ = trained(tmp_path, text)
    conv = model.backbone.layer1[0].conv1
    del conv._parameters['bias']
    conv.bias = torch.nn.Parameter(torch.rand(conv.out_channels))
    _, stock = stock_model(read_config(str(config)), model)
    assert_same_features(stock, model)


def test_groups_that_differ(tmp_path):
    """GN takes one number, so the config carries a class that adapts it."""
    pytest.importorskip('mmdet')
    # 32 is taken for 24 and for 16 where there are fewer channels.
    text = MASK_RCNN.format(norm='BCN', args='')
    model, config, _ = trained(tmp_path, text)
    cfg, stock = stock_model(read_config(str(config)), model)
    assert cfg.model.backbone.norm_cfg.type == 'BatchGroupNorm'
    assert_same_features(stock, model)


STOCK_SEGMENTOR = """
import sys

sys.modules['wsbcn_mm'] = None  # importing it fails from here on
import torch
from mmcv.cnn import fuse_conv_bn
from mmseg.apis import init_model

config, checkpoint, inputs, outputs = sys.argv[1:]
model = init_model(config, checkpoint, device='cpu')
x = torch.load(inputs)
with torch.no_grad():
    plain = model(x, mode='tensor')
    fused = fuse_conv_bn(model)(x, mode='tensor')
torch.save([[plain], [fused]], outputs)
"""


@pytest.mark.slow
def test_stock_mmseg_loads_deeplab(tmp_path, monkeypatch):
    """Its separable convolutions take neither a conv_cfg nor a bias."""
    pytest.importorskip('mmseg')
    model, config, checkpoint = trained(tmp_path, DEEPLAB)
    fold(monkeypatch, config, checkpoint, tmp_path / 'o')
    text = (tmp_path / 'o.py').read_text()
    for word in ('wsbcn', "'BCN'", 'ConvWS'):
        assert word not in text
    written = Config.fromfile(tmp_path / 'o.py')
    assert written.model.backbone.norm_cfg.type == 'GN'
    assert written.model.decode_head.norm_cfg.type == 'BatchGroupNorm'
    assert written.model.auxiliary_head.norm_cfg.type == 'GN'
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x, mode='tensor')
    for (got,) in load_without_us(tmp_path, x, STOCK_SEGMENTOR):
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.slow
def test_deeplab_is_exported(tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, config, checkpoint = trained(tmp_path, DEEPLAB)
    fold(
        *(monkeypatch, config, checkpoint, tmp_path / 'o'),
        *('--onnx', '--shape', 64, 64),
    )
    session = onnxruntime.InferenceSession(str(tmp_path / 'o.onnx'))
    x = torch.randn(1, 3, 64, 64)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = model(x, mode='tensor')
    assert (torch.from_numpy(got) - wanted).abs().max() < 1e-4 * (
        wanted.abs().max()
    )


def test_all_components_without_a_place_are_found_at_once(
    tmp_path, monkeypatch
):
    pytest.importorskip('mmseg')
    model, config, _ = trained(
        tmp_path,
        DEEPLAB + "model.auxiliary_head.type = 'DepthwiseSeparableFCNHead'",
    )
    tried, filled = [], stock._filled
    monkeypatch.setattr(
        stock, '_filled', lambda *args: tried.append(1) or filled(*args)
    )
    cfg, _ = stock_model(read_config(str(config)), model)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        assert head.norm_cfg.type == 'BatchGroupNorm'
    assert len(tried) == 2


def test_layers_that_a_class_has_built_in(tmp_path):
    pytest.importorskip('mmdet')
    config = tmp_path / 'config.py'
    config.write_text(
        "model = dict(type='ConvertedModel', depth=18, conversion=dict("
        "model_type='mmdet.ResNet', norm_cfg=dict(type='BCN'), "
        "conv_cfg=dict(type='ConvWS')))"
    )
    cfg = read_config(str(config))
    model = randomize(MODELS.build(cfg.model))
    with pytest.raises(
        NotExpressible, match='bn1 is a BCN.*BatchNorm2d.*--onnx'
    ):
        stock_model(cfg, model)


@pytest.mark.parametrize('export', [[], ['--onnx']])
def test_bgn_that_splits_channels(tmp_path, monkeypatch, export):
    pytest.importorskip('mmdet')
    text = MASK_RCNN.format(norm='BGN', args=', num_groups=3')
    _, config, checkpoint = trained(tmp_path, text)
    message = r'error: no stock layer can replace backbone\.bgn1: BGN'
    with pytest.raises(SystemExit, match=message):
        fold(monkeypatch, config, checkpoint, tmp_path / 'o', *export)
    assert not list(tmp_path.glob('o.*'))


@pytest.mark.parametrize(
    'write, message',
    [
        (None, 'no checkpoint'),
        (lambda p: p.write_bytes(b''), 'cannot be read'),
        (lambda p: torch.save({'a': 1}, p), 'holds no weights'),
        (lambda p: torch.save([1], p), 'holds a list'),
    ],
)
def test_bad_checkpoints(tmp_path, monkeypatch, write, message):
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'bad.pth'
    config.write_text("model = dict(type='ResNet', depth=18)")
    if write:
        write(checkpoint)
    with pytest.raises(SystemExit, match=message):
        fold(monkeypatch, config, checkpoint, tmp_path / 'o')


class Exploit:
    def __reduce__(self):
        return (eval, ("__import__('os').environ.update(OWNED='1')",))


def test_no_code_is_run(tmp_path, monkeypatch):
    import os

    config, checkpoint = tmp_path / 'config.py', tmp_path / 'bad.pth'
    config.write_text("model = dict(type='ResNet', depth=18)")
    torch.save({'state_dict': {'a': Exploit()}}, checkpoint)
    with pytest.raises(SystemExit, match='cannot be read safely'):
        fold(monkeypatch, config, checkpoint, tmp_path / 'o')
    assert 'OWNED' not in os.environ
