"""Configs whose model is converted once it is built."""

import warnings
from pathlib import Path

import mmdet
import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import BCN, ConvWS, micro_batch_model
from wsbcn_mm.engine import config
from wsbcn_mm.engine.config import unconverted
from wsbcn_mm.feeding import find_feeding_convolutions
from wsbcn_mm.layers._base import NormBase

pytest.importorskip('mmpretrain')

MMDET = Path(mmdet.__file__).parent / '.mim' / 'configs'

CONFIG = """
_base_ = 'mmpretrain::van/van-tiny_8xb128_in1k.py'

from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, images_per_gpu=2, images_per_update=16, convert=True
)
model.head.num_classes = 5
"""


def batch_norms(model: nn.Module) -> list:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, NormBase)
    ]


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(CONFIG)
    cfg = Config.fromfile(path)
    init_default_scope('mmpretrain')
    return cfg


def test_what_a_class_has_built_in_is_converted(cfg):
    assert cfg.model.type == 'ConvertedModel'
    assert cfg.model.conversion.model_type == 'ImageClassifier'
    model = MODELS.build(cfg.model)
    assert type(model).__name__ == 'ImageClassifier'
    assert not batch_norms(model)
    norms = [m for m in model.modules() if isinstance(m, BCN)]
    assert len(norms) == 30
    assert {norm.momentum for norm in norms} == {0.01 * 2 / 16}
    assert sum(isinstance(m, ConvWS) for m in model.modules()) == 4
    assert model.head.fc.out_features == 5
    assert len(batch_norms(MODELS.build(unconverted(cfg.model)))) == 30


def test_without_it_the_message_says_so(cfg):
    with pytest.raises(ValueError, match='convert=True'):
        micro_batch_model(unconverted(cfg.model), convert=False)


def test_the_data_preprocessor_of_the_config_reaches_the_model(cfg, tmp_path):
    cfg.work_dir = str(tmp_path)
    cfg.data_preprocessor.mean = [1, 2, 3]
    for part in ('train', 'val', 'test'):
        for name in ('dataloader', 'cfg', 'evaluator'):
            cfg.pop(f'{part}_{name}', None)
    for name in ('optim_wrapper', 'param_scheduler', 'auto_scale_lr'):
        cfg.pop(name, None)
    model = Runner.from_cfg(cfg).model
    assert model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert not batch_norms(model)
    with torch.no_grad():
        assert len(model.eval()(torch.randn(1, 3, 64, 64))) == 1


# Where a class is known for it ----------------------------------------------

DEEPLABV3PLUS = """
_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_{}.py'

from wsbcn_mm import micro_batch_model

model = micro_batch_model(_base_.model)
"""


def plain_before_normalization(model: nn.Module) -> list:
    """Convolutions without WS where a BCN follows."""
    return [
        feeding.convolution
        for name, feeding in find_feeding_convolutions(model).items()
        if isinstance(model.get_submodule(name), BCN)
        and not isinstance(model.get_submodule(feeding.convolution), ConvWS)
    ]


@pytest.fixture
def deeplabv3plus(tmp_path):
    pytest.importorskip('mmseg')
    path = tmp_path / 'base.py'
    path.write_text(DEEPLABV3PLUS.format('4xb2-80k_cityscapes-512x1024'))
    init_default_scope('mmseg')
    return path


def test_separable_convolutions_of_deeplabv3plus(deeplabv3plus):
    cfg = Config.fromfile(deeplabv3plus)
    assert cfg.model.type == 'ConvertedModel'
    model = MODELS.build(cfg.model)
    separable = model.decode_head.sep_bottleneck[0]
    assert isinstance(separable.depthwise_conv.conv, ConvWS)
    assert isinstance(separable.pointwise_conv.conv, ConvWS)
    assert not plain_before_normalization(model)
    assert type(model.decode_head.conv_seg) is nn.Conv2d
    plain = MODELS.build(unconverted(cfg.model))
    assert len(plain_before_normalization(plain)) == 10


def test_parts_of_a_converted_model_are_where_they_were(
    deeplabv3plus, tmp_path
):
    path = tmp_path / 'config.py'
    path.write_text(
        """_base_ = './base.py'
model = dict(backbone=dict(depth=50), decode_head=dict(num_classes=7))
"""
    )
    cfg = Config.fromfile(path)
    assert (cfg.model.backbone.depth, cfg.model.decode_head.num_classes) == (
        50,
        7,
    )
    cfg = Config.fromstring(cfg.pretty_text, '.py')  # as in work_dirs
    assert MODELS.build(cfg.model).decode_head.conv_seg.out_channels == 7


def test_mmseg_builds_it_for_inference(deeplabv3plus):
    from mmseg.apis import init_model

    model = init_model(str(deeplabv3plus), device='cpu')
    assert not plain_before_normalization(model)


def test_converted_twice_with_other_numbers(deeplabv3plus):
    base = Config.fromfile(deeplabv3plus).model
    once = micro_batch_model(base, images_per_gpu=2)
    assert once.type == 'ConvertedModel'
    assert once.conversion.model_type == 'EncoderDecoder'
    assert once.conversion.norm_cfg.momentum == 0.01 * 2 / 16
    assert once.decode_head.norm_cfg == once.conversion.norm_cfg
    kept = micro_batch_model(base, norm_cfg=dict(type='GN', num_groups=16))
    assert kept.conversion.norm_cfg == dict(type='GN', num_groups=16)


def test_group_norm_has_standardized_separable_convolutions_too(
    deeplabv3plus,
):
    base = Config.fromfile(deeplabv3plus).model
    norm_cfg = dict(type='GN', num_groups=16)
    model = MODELS.build(micro_batch_model(base, norm_cfg))
    separable = model.decode_head.sep_bottleneck[0].depthwise_conv
    assert type(separable.norm) is nn.GroupNorm
    assert isinstance(separable.conv, ConvWS)


def test_not_converted_on_request(deeplabv3plus):
    base = unconverted(Config.fromfile(deeplabv3plus).model)
    with pytest.warns(UserWarning, match='DepthwiseSeparableASPPHead.*False'):
        model = micro_batch_model(base, convert=False)
    assert model.type == 'EncoderDecoder'
    plain = micro_batch_model(base, conv_cfg=dict(type='Conv2d'))
    assert plain.type == 'EncoderDecoder'  # its normalizations are in reach
    with pytest.raises(TypeError, match="convert must be .* got 'yes'"):
        micro_batch_model(base, convert='yes')


@pytest.mark.parametrize(
    'conv_cfg, is_kept',
    [(None, False), (dict(type='Conv2d'), True)],
    ids=['ConvWS', 'Conv2d'],
)
def test_checkpoint_of_a_backbone_that_is_standardized_once_built(
    conv_cfg, is_kept
):
    backbone = dict(
        type='mmseg.STDCNet',  # has no conv_cfg
        stdc_type='STDCNet1',
        in_channels=3,
        channels=(32, 64, 256, 512, 1024),
        bottleneck_type='cat',
        act_cfg=dict(type='ReLU'),
        norm_cfg=dict(type='BN'),
        init_cfg=dict(type='Pretrained', checkpoint='weights.pth'),
    )
    model = dict(type='mmpretrain.ImageClassifier', backbone=backbone)
    for convert in (False, None):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter('always')
            result = micro_batch_model(
                model, conv_cfg=conv_cfg, convert=convert
            )
        has_checkpoint = result.backbone.get('init_cfg') is not None
        assert has_checkpoint == (is_kept or convert is False)


# Classes of one's own --------------------------------------------------------


class OwnBackbone(BaseModule):
    """Four stages with BN, whatever a config says."""

    norm = nn.BatchNorm2d

    def __init__(self, init_cfg=None, conv_cfg=None):
        super().__init__(init_cfg)
        widths = [3, 16, 32, 64, 128]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), self.norm(b))
            for a, b in zip(widths, widths[1:])
        )

    def forward(self, x):
        outs = []
        for stage in self.stages:
            x = stage(x)
            outs.append(x)
        return tuple(outs)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


class OwnBackboneWithOwnNorm(OwnBackbone):
    norm = OwnForward


BN = dict(type='BN')


class OwnGate(BaseModule):
    """Uses conv_cfg where no normalization follows, too."""

    def __init__(self, conv_cfg=None, norm_cfg=BN):
        super().__init__()
        self.block = ConvModule(3, 8, 3, conv_cfg=conv_cfg, norm_cfg=norm_cfg)
        self.gate = build_conv_layer(conv_cfg, 8, 8, 1)

    def forward(self, x):
        x = self.block(x)
        return (x * self.gate(x).sigmoid(),)


class OwnDepthwise(BaseModule):
    """Uses conv_cfg for filters of one weight."""

    def __init__(self, conv_cfg=None, norm_cfg=BN):
        super().__init__()
        options = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
        self.stem = ConvModule(3, 8, 3, **options)
        self.scale = ConvModule(8, 8, 1, groups=8, **options)

    def forward(self, x):
        return (self.scale(self.stem(x)),)


class OwnPretrained(OwnBackbone):
    def __init__(self, pretrained=False):
        super().__init__()


OWN = (
    OwnBackbone,
    OwnBackboneWithOwnNorm,
    OwnGate,
    OwnDepthwise,
    OwnPretrained,
)


@pytest.fixture
def register():
    def register(*classes):
        for kind in classes:
            MODELS.register_module(module=kind, force=True)

    yield register
    for kind in OWN:
        MODELS.module_dict.pop(kind.__name__, None)


def own_classifier(kind: str = 'OwnBackbone', **options) -> dict:
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type=kind, **options),
        head=dict(
            type='mmpretrain.LinearClsHead',
            num_classes=3,
            in_channels=128,
        ),
    )


def own_segmenter() -> dict:
    norm_cfg = dict(type='SyncBN')
    return dict(
        type='mmseg.EncoderDecoder',
        backbone=dict(type='OwnBackbone'),
        decode_head=dict(
            type='mmseg.FCNHead',
            in_channels=128,
            channels=16,
            num_classes=3,
            norm_cfg=norm_cfg,
        ),
        test_cfg=dict(mode='whole'),
    )


def own_detector(path: str) -> dict:
    cfg = Config.fromfile(MMDET / path).model
    cfg.backbone = dict(type='OwnBackbone')
    cfg.neck.in_channels = [16, 32, 64, 128]
    return cfg


@pytest.mark.parametrize('is_registered', [True, False])
@pytest.mark.parametrize(
    'make',
    [
        lambda: own_detector('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
        lambda: own_detector('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
        lambda: own_detector('retinanet/retinanet_r50_fpn_1x_coco.py'),
        own_segmenter,
        own_classifier,
    ],
    ids=['mask-rcnn', 'faster-rcnn', 'retinanet', 'segmenter', 'classifier'],
)
def test_backbone_with_its_own_batch_norm(make, is_registered, register):
    """FPN and heads, whose norms are in reach, once hid that it kept BN."""
    cfg = make()
    scope = 'mmdet' if 'neck' in cfg else None
    if is_registered:  # else it is imported after the config
        register(OwnBackbone)
    with DefaultScope.overwrite_default_scope(scope):
        cfg = micro_batch_model(cfg)
        register(OwnBackbone)
        model = MODELS.build(cfg)
    assert not batch_norms(model)
    assert all(
        isinstance(stage[0], ConvWS) and isinstance(stage[1], BCN)
        for stage in model.backbone.stages
    )
    assert not plain_before_normalization(model)


def test_batch_norm_that_has_to_stay_is_named(register, monkeypatch):
    register(OwnBackboneWithOwnNorm)
    told = []
    monkeypatch.setattr(config, 'print_log', lambda m, logger: told.append(m))
    config._tell.cache_clear()
    cfg = own_classifier('OwnBackboneWithOwnNorm')
    with pytest.raises(ValueError, match='no normalization to replace'):
        micro_batch_model(cfg)
    config._tell.cache_clear()
    cfg = own_detector('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.backbone.type = 'OwnBackboneWithOwnNorm'
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert micro_batch_model(cfg).type == 'MaskRCNN'
    assert '4 batch normalizations stay' in told[-1]
    assert 'backbone.stages.0.1: has a forward of its own' in told[-1]


@pytest.mark.parametrize('is_registered', [True, False])
def test_checkpoint_of_ones_own_backbone(is_registered, register):
    """It was trained without WS: kept on request only."""
    init_cfg = dict(type='Pretrained', checkpoint='own.pth')
    for pretrained, is_kept in ((None, False), (False, False), (True, True)):
        MODELS.module_dict.pop('OwnBackbone', None)
        if is_registered:
            register(OwnBackbone)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            cfg = micro_batch_model(
                own_classifier(init_cfg=init_cfg), pretrained=pretrained
            )
            register(OwnBackbone)
            model = MODELS.build(cfg)
        assert bool(model.backbone.init_cfg) == is_kept
        told = [str(w.message) for w in caught if 'own.pth' in str(w.message)]
        assert len(told) == (pretrained is None)


@pytest.mark.parametrize('pretrained', [None, False])
def test_weights_that_a_class_loads_by_itself(register, pretrained):
    """What it is shows once it is built, and then they are in it."""
    cfg = micro_batch_model(
        own_classifier('OwnPretrained', pretrained=True), pretrained=pretrained
    )
    register(OwnPretrained)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        MODELS.build(cfg)
    told = [w for w in caught if 'by itself' in str(w.message)]
    assert len(told) == (pretrained is None)


def test_weights_that_timm_brings():
    cfg = own_classifier(
        'mmpretrain.TIMMBackbone',
        model_name='resnet18',
        features_only=True,
        pretrained=True,
    )
    with pytest.warns(UserWarning, match='not from weights of its own'):
        result = micro_batch_model(cfg)
    assert result.backbone.pretrained is False
    assert micro_batch_model(cfg, pretrained=True).backbone.pretrained is True
    model = MODELS.build(result)
    assert not batch_norms(model)


def test_transformer_keeps_its_checkpoint():
    """Nothing in it is standardized, though its neck is."""
    cfg = Config.fromfile(
        MMDET / 'swin' / 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
    ).model
    with DefaultScope.overwrite_default_scope('mmdet'):
        result = micro_batch_model(cfg)
    assert result.type == 'MaskRCNN'
    assert result.backbone.init_cfg == cfg.backbone.init_cfg


@pytest.mark.parametrize('is_registered', [True, False])
def test_conv_cfg_where_no_normalization_follows(is_registered, register):
    if is_registered:
        register(OwnGate)
    cfg = micro_batch_model(own_classifier('OwnGate', norm_cfg=BN))
    register(OwnGate)
    model = MODELS.build(cfg)
    assert isinstance(model.backbone.block.conv, ConvWS)
    assert isinstance(model.backbone.block.norm, BCN)
    assert type(model.backbone.gate) is nn.Conv2d


def test_conv_cfg_for_filters_of_one_weight(register):
    register(OwnDepthwise)
    model = MODELS.build(micro_batch_model(own_classifier('OwnDepthwise')))
    assert isinstance(model.backbone.stem.conv, ConvWS)
    assert type(model.backbone.scale.conv) is nn.Conv2d
    assert isinstance(model.backbone.scale.norm, BCN)


def test_trial_draws_no_random_numbers():
    state = torch.get_rng_state()
    path = 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'  # built on the CPU
    with DefaultScope.overwrite_default_scope('mmdet'):
        micro_batch_model(Config.fromfile(MMDET / path).model)
    assert torch.equal(torch.get_rng_state(), state)
