"""Configs whose model is converted once it is built."""

import warnings

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import BCN, ConvWS, micro_batch_model
from wsbcn_mm.engine.config import unconverted
from wsbcn_mm.feeding import find_feeding_convolutions
from wsbcn_mm.layers.batch_statistics import BatchStatistics

pytest.importorskip('mmpretrain')

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
        if isinstance(module, _BatchNorm)
        and not isinstance(module, BatchStatistics)
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
