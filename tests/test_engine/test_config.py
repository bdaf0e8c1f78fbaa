import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyObject
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from training_step import assert_trains, training_step

from wsbcn_mm import BCN, ConvWS, micro_batch_model
from wsbcn_mm.consumers import record_consumers
from wsbcn_mm.engine import config

NORM = dict(
    type='BCN', num_groups=32, momentum=0.01 / 16, momentum_annealing=True
)
WS = dict(type='ConvWS')


def from_file(tmp_path: Path, text: str) -> Config:
    path = tmp_path / 'config.py'
    path.write_text(text)
    return Config.fromfile(path)


def zoo(path: str) -> ConfigDict:
    """The model of a zoo config, such as 'mmdet::gn/...'."""
    library, path = path.split('::')
    module = __import__(library)
    folder = Path(module.__file__).parent / '.mim' / 'configs'
    return Config.fromfile(folder / path).model


def converted(path: str, **kwargs) -> ConfigDict:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return micro_batch_model(zoo(path), **kwargs)


def classifier(**backbone) -> dict:
    return dict(
        type='ImageClassifier', backbone=dict(type='ResNet', **backbone)
    )


def walk(cfg):
    if isinstance(cfg, dict):
        yield cfg
        for value in cfg.values():
            yield from walk(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from walk(value)


# In a config file


RETINANET = """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
from wsbcn_mm import micro_batch_model
model = micro_batch_model(_base_.model{})
"""


@pytest.mark.filterwarnings('ignore:micro_batch_model')
def test_three_line_config_trains(tmp_path):
    cfg = from_file(tmp_path, RETINANET.format(''))
    model, loss = training_step(cfg.model, 'mmdet')
    assert_trains(model, loss)
    assert isinstance(model.backbone.bcn1, BCN)
    assert isinstance(model.backbone.conv1, ConvWS)
    # The zoo's RetinaNet has no normalization in its neck and head.
    for part in (model.neck, model.bbox_head):
        assert not any(isinstance(m, (BCN, ConvWS)) for m in part.modules())


@pytest.mark.filterwarnings('ignore:micro_batch_model')
def test_result_replaces_the_model_of_the_base(tmp_path):
    """mmengine merges: what was removed would come back."""
    (tmp_path / 'base.py').write_text(
        "model = dict(type='ImageClassifier', backbone=dict(type='ResNet', "
        "depth=50, norm_cfg=dict(type='BN', eps=1e-3, momentum=0.03, "
        "requires_grad=False), init_cfg=dict(type='Pretrained', "
        "checkpoint='somewhere')))\n"
    )
    cfg = from_file(
        tmp_path,
        "_base_ = './base.py'\n"
        'from wsbcn_mm import micro_batch_model\n'
        'model = micro_batch_model(_base_.model)\n',
    )
    backbone = cfg.model.backbone
    assert backbone.norm_cfg == NORM
    assert 'init_cfg' not in backbone
    assert not any('_delete_' in part for part in walk(cfg.model))


@pytest.mark.filterwarnings('ignore:micro_batch_model')
def test_dump_reload_inherit_override(tmp_path):
    cfg = from_file(tmp_path, RETINANET.format(''))
    assert cfg.model['_scope_'] == 'mmdet'
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()
    (tmp_path / 'child.py').write_text(
        "_base_ = './config.py'\nmodel = dict(backbone=dict(depth=101))\n"
    )
    child = Config.fromfile(tmp_path / 'child.py')
    assert child.model.backbone.depth == 101
    assert child.model.backbone.norm_cfg == cfg.model.backbone.norm_cfg
    child.merge_from_dict({'model.backbone.norm_cfg.num_groups': 16})
    assert child.model.backbone.norm_cfg.num_groups == 16


@pytest.mark.filterwarnings('ignore:micro_batch_model')
def test_second_conversion_in_a_chain(tmp_path):
    (tmp_path / 'base.py').write_text(RETINANET.format(''))
    cfg = from_file(
        tmp_path,
        "_base_ = './base.py'\n"
        'from wsbcn_mm import micro_batch_model\n'
        'model = micro_batch_model(\n'
        "    _base_.model, norm_cfg=dict(type='GN', num_groups=32))\n",
    )
    assert cfg.model.backbone.norm_cfg == dict(type='GN', num_groups=32)
    assert cfg.model['_scope_'] == 'mmdet'


def test_result_can_be_built_copied_and_pickled():
    model = micro_batch_model(classifier(depth=18, base_channels=8))
    for result in (model, copy.deepcopy(model), copy.copy(model)):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            assert isinstance(MODELS.build(result).backbone.bcn1, BCN)
    assert pickle.loads(pickle.dumps(model)) == model
    assert model.pop('absent', 'default') == 'default'
    assert model.pop('backbone').type == 'ResNet'


def test_input_is_untouched():
    model = zoo('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    before = copy.deepcopy(model)
    norm_cfg = dict(type='BCN', num_groups=16)
    with pytest.warns(UserWarning, match='jhu'):
        result = micro_batch_model(model, norm_cfg=norm_cfg)
    assert model.to_dict() == before.to_dict()
    assert norm_cfg == dict(type='BCN', num_groups=16)
    # Nor may the components share one dict.
    result.backbone.norm_cfg.num_groups = 8
    assert result.neck.norm_cfg.num_groups == 16


def test_delete_keys_of_the_input_are_gone():
    """The result is not merged, so nothing would take them away."""
    model = classifier(depth=50)
    model['backbone']['_delete_'] = True
    assert '_delete_' not in micro_batch_model(model).backbone.to_dict()


# New-style configs, whose types are classes

LAZY = """
from mmdet.models import FPN, DetDataPreprocessor, RetinaHead, RetinaNet
from mmdet.models import backbones
from mmdet.models.task_modules import AnchorGenerator
from mmengine.model import PretrainedInit
from torch import nn

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(
        type=backbones.ResNet,
        depth=18,
        norm_cfg=dict(type=nn.BatchNorm2d),
        init_cfg=dict(type=PretrainedInit, checkpoint='somewhere'),
    ),
    neck=dict(
        type=FPN, in_channels=[64, 128, 256, 512], out_channels=64, num_outs=5
    ),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=3,
        in_channels=64,
        anchor_generator=dict(
            type=AnchorGenerator, ratios=[1.0], scales=[8], strides=[8] * 5
        ),
    ),
)
"""


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    (tmp_path / 'base.py').write_text(LAZY)
    return tmp_path / 'base.py'


def assert_converted(cfg, folder):
    """Now, and after it was dumped and loaded."""
    cfg.dump(folder / 'dumped.py')
    for part in walk(cfg.model.to_dict()):
        assert isinstance(part.get('type', ''), str)
    with DefaultScope.overwrite_default_scope('mmdet'):
        for model in (cfg.model, Config.fromfile(folder / 'dumped.py').model):
            model = MODELS.build(model)
            kinds = [type(m) for m in model.modules()]
            assert kinds.count(BCN) == kinds.count(ConvWS) == 20
            assert nn.BatchNorm2d not in kinds
            assert model.backbone.bcn1.num_groups == 16


@pytest.mark.filterwarnings('ignore:micro_batch_model')
@pytest.mark.parametrize(
    'norm, conv', [("'BCN'", "'ConvWS'"), ('BCN', 'ConvWS')]
)
def test_inside_a_new_style_config(lazy, norm, conv):
    path = lazy.parent / 'config.py'
    path.write_text(f"""
from mmengine.config import read_base
with read_base():
    from .base import *
from wsbcn_mm import BCN, ConvWS, micro_batch_model
model = micro_batch_model.build()(
    model, norm_cfg=dict(type={norm}, num_groups=16),
    conv_cfg=dict(type={conv}))
""")
    cfg = Config.fromfile(path)
    assert 'init_cfg' not in cfg.model.backbone
    assert_converted(cfg, lazy.parent)


@pytest.mark.filterwarnings('ignore:micro_batch_model')
@pytest.mark.parametrize(
    'norm, conv',
    [
        (BCN, ConvWS),
        (LazyObject('wsbcn_mm', 'BCN'), LazyObject('wsbcn_mm', 'ConvWS')),
        (LazyObject('wsbcn_mm').BCN, LazyObject('wsbcn_mm').ConvWS),
        ('wsbcn_mm.BCN', 'wsbcn_mm.layers.conv_ws.ConvWS'),
    ],
    ids=['class', 'LazyObject', 'LazyAttr', 'path'],
)
def test_new_style_config_that_is_loaded(lazy, norm, conv):
    cfg = Config.fromfile(lazy)
    before = copy.deepcopy(cfg.model)
    cfg.model = micro_batch_model(
        cfg.model,
        norm_cfg=ConfigDict(type=norm, num_groups=16),
        conv_cfg=ConfigDict(type=conv),
    )
    assert cfg.model.backbone.norm_cfg.type == 'BCN'
    assert cfg.model.bbox_head.type == 'mmdet.RetinaHead'
    assert_converted(cfg, lazy.parent)
    assert before.backbone.norm_cfg.type is nn.BatchNorm2d
    again = micro_batch_model(
        cfg.model, norm_cfg=dict(type=nn.GroupNorm, num_groups=16)
    )
    assert again.backbone.norm_cfg == dict(type='GN', num_groups=16)


def test_class_that_no_text_names():
    """A class of this function: the config can be built, not dumped."""

    class Local(nn.Module):
        def __init__(self, norm_cfg=None, conv_cfg=None):
            super().__init__()
            self.block = ConvModule(
                3, 8, 3, norm_cfg=norm_cfg, conv_cfg=conv_cfg
            )

    model = micro_batch_model(dict(type=Local, norm_cfg=dict(type='BN')))
    assert model.type is Local
    built = MODELS.build(model).block
    assert isinstance(built.norm, BCN) and isinstance(built.conv, ConvWS)


@pytest.mark.filterwarnings('ignore:micro_batch_model')
@pytest.mark.parametrize(
    'prefix',
    ['', 'mmdet.', 'mmdet.models.roi_heads.bbox_heads.convfc_bbox_head.'],
)
def test_scope_of_a_head_that_is_replaced(prefix):
    model = zoo('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    model.roi_head.bbox_head.type = f'{prefix}Shared2FCBBoxHead'
    model = micro_batch_model(model)
    head = model.roi_head.bbox_head
    assert head.type == f'{prefix}Shared4Conv1FCBBoxHead'
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmdet'):
        assert len(MODELS.build(model).roi_head.bbox_head.shared_convs) == 4


def test_scope_of_one_dimension():
    model = dict(
        type='mmseg.OCRHead',  # no matter which: conv_cfg is what is meant
        norm_cfg=dict(type='BN'),
        conv_cfg=dict(type='Conv1d'),
    )
    model = micro_batch_model(model, conv_cfg=dict(type='wsbcn_mm.ConvWS'))
    assert model.conv_cfg.type == 'ConvWS1d'


# What is replaced


def test_norm_cfg():
    def norm(**kwargs):
        model = micro_batch_model(classifier(depth=50), **kwargs)
        return model.backbone.norm_cfg

    assert norm() == NORM
    assert norm(images_per_gpu=2)['momentum'] == pytest.approx(0.01 / 8)
    assert norm(images_per_update=64)['momentum'] == pytest.approx(0.01 / 64)
    given = dict(type='BCN', momentum=0.5)
    assert norm(norm_cfg=given) == given
    batch = norm(norm_cfg=dict(type='BCN', estimate=False))
    assert batch['momentum'] == 0.1  # for evaluation only: BN's
    given = dict(type='GN', num_groups=32)
    assert norm(norm_cfg=given, images_per_gpu=2) == given
    mabn = norm(norm_cfg=dict(type='MABN'), images_per_gpu=2)
    assert mabn == dict(type='MABN', batch_size=2, simulated_batch_size=32)


@pytest.mark.parametrize('kind', ['BN', 'SyncBN', 'GN', 'IN', 'BCN', 'BN2d'])
def test_every_kind_of_normalization_is_replaced(kind):
    norm_cfg = dict(type=kind, eps=1e-3, requires_grad=False)
    model = micro_batch_model(classifier(depth=50, norm_cfg=norm_cfg))
    assert model.backbone.norm_cfg == NORM


def test_without_weight_standardization():
    for conv_cfg in (None, dict(type='ConvWS')):
        model = micro_batch_model(
            classifier(depth=50, conv_cfg=conv_cfg),
            conv_cfg=dict(type='Conv2d'),
        )
        assert (model.backbone.conv_cfg or dict(type='Conv2d')) == dict(
            type='Conv2d'
        )
    assert micro_batch_model(classifier(depth=50)).backbone.conv_cfg == WS


def test_special_convolutions_stay():
    special = dict(type='Conv2dAdaptivePadding')
    model = micro_batch_model(classifier(depth=50, conv_cfg=special))
    assert model.backbone.conv_cfg == special
    # mmdet's ResNet takes no conv_cfg beside dcn.
    path = 'mmdet::dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py'
    model = converted(path)
    assert model.backbone.dcn.type == 'DCNv2'
    assert model.backbone.norm_cfg.type == 'BCN'
    assert 'conv_cfg' not in model.backbone
    assert model.roi_head.mask_head.conv_cfg == WS
    with DefaultScope.overwrite_default_scope('mmdet'):
        MODELS.build(model.backbone)


def test_lateral_convolution_without_normalization_stays_plain():
    """EfficientNet's FPN normalizes only its last convolutions."""
    path = 'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py'
    neck = converted(path).neck
    assert neck.no_norm_on_lateral and neck.norm_cfg.type == 'BCN'
    assert 'conv_cfg' not in neck


def test_layer_normalization_stays():
    layer_norm = dict(type='LN')
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet', depth=50),
        neck=dict(type='SwinTransformer', norm_cfg=layer_norm),
        head=dict(type='PoolFormer', norm_cfg=dict(type='GN', num_groups=1)),
    )
    result = micro_batch_model(model)
    assert result.neck.norm_cfg == layer_norm
    assert result.head.norm_cfg == dict(type='GN', num_groups=1)


def test_class_defaults_are_replaced():
    """HRNet's config names no normalization: it silently has BN."""
    path = 'mmdet::hrnet/mask-rcnn_hrnetv2p-w18-1x_coco.py'
    assert 'norm_cfg' not in zoo(path).backbone
    model = converted(path)
    assert model.backbone.norm_cfg == NORM
    assert model.backbone.conv_cfg == WS
    # HRFPN has none by default, and is no FPN.
    assert 'norm_cfg' not in model.neck and 'conv_cfg' not in model.neck


def test_defaults_of_base_classes_are_found():
    """FCOSHead's GN is a default that ATSSHead and others take over."""
    for path, part in (
        ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 'bbox_head'),
        ('mmdet::resnest/mask-rcnn_s50_fpn_syncbn-backbone+head_ms-1x_coco.py',
         'backbone'),
    ):  # fmt: skip
        model = converted(path)
        assert model[part].norm_cfg.type == 'BCN'
        assert model[part].conv_cfg == WS


def test_part_without_type():
    """SOLOv2's mask feature head is a dict without a type."""
    model = converted('mmdet::solov2/solov2_r50_fpn_1x_coco.py')
    head = model.mask_head
    assert head.mask_feature_head.norm_cfg.type == 'BCN'
    assert head.mask_feature_head.conv_cfg == WS
    assert 'type' not in head.mask_feature_head
    assert head.norm_cfg.type == 'BCN'  # a default
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmdet'):
        built = MODELS.build(model)
    norms = (nn.GroupNorm, nn.BatchNorm2d)
    for module in built.modules():
        assert isinstance(module, BCN) or not isinstance(module, norms)


def test_lists_of_parts():
    path = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'
    model = converted(path)
    assert isinstance(model.roi_head.bbox_head, list)
    model.roi_head.bbox_head[1].norm_cfg = dict(type='BN')
    model.roi_head.bbox_head[1].type = 'Shared4Conv1FCBBoxHead'
    model = micro_batch_model(model)
    assert 'norm_cfg' not in model.roi_head.bbox_head[0]
    assert model.roi_head.bbox_head[1].norm_cfg.type == 'BCN'
    assert model.roi_head.bbox_head[1].conv_cfg == WS


def test_mask_rcnn_gets_the_form_of_the_paper():
    """That of the zoo's own GN+WS config, with GN in."""
    path = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    model = converted(path, norm_cfg=dict(type='GN', num_groups=32))
    theirs = zoo('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py')
    for part in walk(theirs):
        if 'norm_cfg' in part:
            part.norm_cfg.pop('requires_grad')
    theirs.backbone.update(norm_eval=False, frozen_stages=-1)
    theirs.roi_head.mask_head.setdefault('conv_out_channels', 256)
    assert model.to_dict() == theirs.to_dict()


@pytest.mark.parametrize(
    'backbone, where',
    [
        (dict(type='ResNet', depth=50, frozen_stages=1, norm_eval=True), -1),
        (dict(type='EfficientNet', arch='b0', frozen_stages=3), 0),
    ],
)
def test_nothing_is_frozen(backbone, where):
    model = micro_batch_model(dict(type='ImageClassifier', backbone=backbone))
    assert model.backbone.frozen_stages == where
    assert model.backbone.norm_eval is False


def test_default_norm_eval_is_switched_off():
    """norm_eval=True is a default of mmdet's ResNet."""
    model = converted('mmdet::solov2/solov2_r50_fpn_1x_coco.py')
    assert model.backbone.norm_eval is False


def test_data_preprocessor_is_untouched():
    path = 'mmdet::mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py'
    assert converted(path).data_preprocessor == zoo(path).data_preprocessor


@pytest.mark.parametrize(
    'head',
    [
        dict(type='NLHead'),
        dict(type='DNLHead'),
        dict(
            type='EMAHead',
            ema_channels=16,
            num_bases=4,
            num_stages=1,
            momentum=0.1,
        ),
        dict(type='ANNHead', in_index=[0, 0], in_channels=[8, 8],
             project_channels=8),
        dict(type='APCHead', pool_scales=(1, 2)),
        dict(type='DAHead', pam_channels=8),
        dict(type='DMHead', filter_sizes=(1, 3)),
        dict(type='EncHead', in_index=[0], in_channels=[8], num_codes=4,
             use_se_loss=False),
        dict(type='FCNHead', num_convs=2),
        dict(type='GCHead'),
        dict(type='ISAHead', isa_channels=8, down_factor=(2, 2)),
        dict(type='PSPHead', pool_scales=(1, 2)),
        dict(type='UPerHead', in_index=[0, 0], in_channels=[8, 8],
             pool_scales=(1, 2)),
        dict(
            type='DepthwiseSeparableASPPHead',
            dilations=(1, 2),
            c1_in_channels=8,
            c1_channels=12,
        ),
    ],
    ids=lambda head: head['type'],
)  # fmt: skip
def test_no_standardization_where_no_normalization_follows(head):
    defaults = dict(
        in_index=0,
        in_channels=8,
        channels=16,
        num_classes=3,
        norm_cfg=dict(type='SyncBN'),
    )
    model = micro_batch_model(
        dict(type='EncoderDecoder', decode_head={**defaults, **head})
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        built = MODELS.build(model.decode_head)
    inputs = [torch.randn(1, 8, 16, 16)]
    with record_consumers(built) as consumers:
        built(inputs)
    assert any(isinstance(m, BCN) for m in built.modules())
    for name, module in built.named_modules():
        if isinstance(module, ConvWS):
            assert consumers.only_normalizations(module), name


# Checkpoints


def test_useless_checkpoint_is_replaced_with_a_warning():
    path = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
    with pytest.warns(UserWarning, match='jhu/resnet50_gn_ws.*torchvision'):
        model = micro_batch_model(zoo(path))
    checkpoint = model.backbone.init_cfg.checkpoint
    assert checkpoint == 'open-mmlab://jhu/resnet50_gn_ws'
    # The function of a GN checkpoint needs an affine for every channel.
    assert model.backbone.norm_cfg.channel_affine == 'channel'


@pytest.mark.parametrize(
    'path',
    [
        'mmdet::mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py',
        'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    ],
)
def test_checkpoint_without_counterpart_is_removed_with_a_warning(path):
    with pytest.warns(UserWarning, match='starts from scratch, not from'):
        model = micro_batch_model(zoo(path))
    assert model.get('pretrained') is None
    assert 'init_cfg' not in model.backbone
    assert model.backbone.zero_init_residual is False
    assert 'channel_affine' not in model.backbone.norm_cfg


@pytest.mark.parametrize(
    'path',
    [
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    ],
)
def test_choice_of_checkpoint(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_gn_ws.pth').touch()
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a choice needs no warning
        model = zoo(path)
        scratch = micro_batch_model(model, pretrained=False)
        kept = micro_batch_model(model, pretrained=True)
        given = micro_batch_model(model, pretrained='my_gn_ws.pth')
        plain = micro_batch_model(model, conv_cfg=dict(type='Conv2d'))

    def checkpoint(cfg):
        init = cfg.backbone.get('init_cfg') or dict(checkpoint=None)
        return cfg.get('pretrained') or init['checkpoint']

    assert checkpoint(scratch) is None
    assert scratch.backbone.zero_init_residual is False
    assert checkpoint(kept) == checkpoint(plain) == checkpoint(model)
    assert checkpoint(given) == 'my_gn_ws.pth'
    assert given.backbone.norm_cfg.channel_affine == 'channel'


def test_zoo_gn_ws_config_keeps_its_checkpoint():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = micro_batch_model(
            zoo('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py')
        )
    checkpoint = model.backbone.init_cfg.checkpoint
    assert checkpoint == 'open-mmlab://jhu/resnet50_gn_ws'
    assert model.backbone.norm_cfg.channel_affine == 'channel'


def test_from_scratch_blocks_are_alive():
    """Zero-init must leave every block a gradient."""
    for zero_init in (True, False):
        model = micro_batch_model(
            classifier(depth=18, base_channels=8, zero_init_residual=zero_init)
        )
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            backbone = MODELS.build(model.backbone)
        backbone.init_weights()
        norm = backbone.layer1[0].bcn2
        assert (norm.weight == 0).all() == zero_init
        assert (norm.batch_weight == 1).all()
        backbone.train()
        backbone(torch.randn(1, 3, 32, 32))[-1].square().sum().backward()
        assert norm.weight.grad.abs().sum() > 0


# Errors


def test_not_a_model_config():
    with pytest.raises(TypeError, match=r"must be a dict.*got 'resnet'"):
        micro_batch_model('resnet')
    with pytest.raises(ValueError, match=r"must have a 'type'.*depth"):
        micro_batch_model(dict(depth=50))
    with pytest.raises(ValueError, match=r'no normalization.*SSD'):
        micro_batch_model(dict(type='SSD', backbone=dict(type='SSDVGG')))


def test_bad_norm_and_conv():
    model = classifier(depth=50)
    with pytest.raises(TypeError, match="norm_cfg must be a dict.*'BCN'"):
        micro_batch_model(model, norm_cfg='BCN')
    with pytest.raises(ValueError, match="norm_cfg must name.*'ReLU'"):
        micro_batch_model(model, norm_cfg=dict(type='ReLU'))
    with pytest.raises(ValueError, match="norm_cfg must have a 'type'"):
        micro_batch_model(model, norm_cfg=dict(num_groups=32))
    with pytest.raises(ValueError, match="conv_cfg must name.*'ConvWs'"):
        micro_batch_model(model, conv_cfg=dict(type='ConvWs'))
    with pytest.raises(ValueError, match="conv_cfg must name.*'ReLU'"):
        micro_batch_model(model, conv_cfg=dict(type='ReLU'))
    with pytest.raises(ValueError, match='^micro_batch_model: images_per_up'):
        micro_batch_model(model, images_per_gpu=32)
    with pytest.raises(TypeError, match='pretrained must be'):
        micro_batch_model(model, pretrained=1.0)


@pytest.mark.parametrize(
    'norm_cfg, message',
    [
        (dict(type='BCN', num_group=16), "BCN.*'num_group'.*'num_groups'?"),
        (dict(type='GN', num_group=16), "GroupNorm.*'num_group'"),
        (dict(type='SyncBCN', momentums=0.1), "SyncBCN.*'momentums'"),
        (dict(type='BCN', zzz=1), "no argument 'zzz'. It has .*momentum"),
        (dict(type='BCN', momentum=2.0), r'BCN: momentum must be .*got 2'),
        (dict(type='BCN', num_groups=0), 'num_groups must be .*got 0'),
        (dict(type='BCN', channel_affine='x'), "'group' or 'channel'"),
        (dict(type='MABN', batch_size=0), 'MABN: batch_size must be'),
        (dict(type='BGN'), 'num_groups'),
    ],
)
def test_settings_that_a_layer_does_not_take(norm_cfg, message):
    with pytest.raises(
        (TypeError, ValueError), match=f'^micro_batch_model: .*{message}'
    ):
        micro_batch_model(classifier(depth=50), norm_cfg=norm_cfg)


def test_settings_of_a_convolution():
    model = classifier(depth=50)
    with pytest.raises(ValueError, match="ConvWS has no argument 'epsilon'"):
        micro_batch_model(model, conv_cfg=dict(type='ConvWS', epsilon=1e-5))
    with pytest.raises(ValueError, match='ConvWS: eps'):
        micro_batch_model(model, conv_cfg=dict(type='ConvWS', eps=-1))


@pytest.mark.filterwarnings('error')
def test_settings_that_a_layer_takes():
    before = torch.get_rng_state()
    for norm_cfg in (
        dict(type='BCN', num_groups=64, requires_grad=True, momentum=None),
        dict(type='SyncBCN', process_group=None, estimate=False),
        dict(type='BGN', num_groups=8),
        dict(type='MABN', warmup_iters=0),
        dict(type='GN', num_groups=48, eps=1e-3),
        dict(type='BN', momentum=0.01, track_running_stats=False),
    ):
        model = micro_batch_model(classifier(depth=50), norm_cfg=norm_cfg)
        norm = model.backbone.norm_cfg
        assert {k: norm[k] for k in norm_cfg} == norm_cfg
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_checkpoint_is_told(tmp_path):
    model = classifier(depth=50)
    with pytest.warns(UserWarning, match="no pretrained='no/such.pth'"):
        micro_batch_model(model, pretrained='no/such.pth')
    path = tmp_path / 'x.pth'
    path.write_bytes(b'')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name in (str(path), 'torchvision://resnet50'):
            micro_batch_model(model, pretrained=name)


def test_warnings_point_at_the_config(tmp_path):
    with pytest.warns(UserWarning, match='jhu') as caught:
        from_file(tmp_path, RETINANET.format(''))
    (told,) = [w for w in caught if 'jhu' in str(w.message)]
    assert told.filename == str(tmp_path / 'config.py')
    assert told.lineno == 4


def test_another_box_head_is_told_once(monkeypatch):
    path = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    told = []
    monkeypatch.setattr(config, 'print_log', lambda m, logger: told.append(m))
    config._tell.cache_clear()
    converted(path)
    model = converted(path)
    assert len(told) == 1  # nothing of the mask head, whose type stays
    assert 'Shared4Conv1FCBBoxHead takes the place of Shared2FC' in told[0]
    line = 'model.roi_head.bbox_head = _base_.model.roi_head.bbox_head'
    assert line in told[0]
    model.roi_head.bbox_head = zoo(path).roi_head.bbox_head
    assert model.roi_head.bbox_head.type == 'Shared2FCBBoxHead'


def test_checkpoint_for_no_backbone():
    with pytest.raises(ValueError, match="'some.pth'.*'ResNet' has none"):
        micro_batch_model(dict(type='ResNet', depth=50), pretrained='some.pth')


def test_unregistered_class_is_told():
    model = classifier(depth=50)
    model['neck'] = dict(type='Unheard', norm_cfg=dict(type='BN'))
    with pytest.warns(UserWarning, match='Unheard is not registered'):
        model = micro_batch_model(model)
    assert model.neck.norm_cfg == NORM


def test_layers_out_of_reach_are_converted_later_and_told(monkeypatch):
    path = 'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py'
    told = []
    monkeypatch.setattr(config, 'print_log', lambda m, logger: told.append(m))
    config._tell.cache_clear()
    assert converted(path).type == 'ConvertedModel'
    assert len(told) == 1 and 'some layers of DoubleConvFCBBoxHead' in told[0]
    with pytest.warns(UserWarning, match='DoubleConv.*convert_to_micro_batch'):
        model = micro_batch_model(zoo(path), convert=False)
    assert model.type == 'FasterRCNN'


def test_type_stays_where_the_config_reaches_all():
    """DyHead's own GroupNorms depend on no batch: nothing is left to do."""
    path = 'mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py'
    assert converted(path).type == 'ATSS'


def test_vectors_are_told():
    model = classifier(depth=50)
    model['neck'] = dict(type='NonLinearNeck')
    with pytest.warns(UserWarning, match='NonLinearNeck normalizes vectors'):
        assert 'norm_cfg' not in micro_batch_model(model).neck


def test_gate_of_cgnet_sees_a_scale():
    """Found by the sweep of the zoos: nothing normalizes its bottlenecks."""
    path = 'mmseg::cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680.py'
    with DefaultScope.overwrite_default_scope('mmseg'):
        backbone = MODELS.build(converted(path).backbone)
    with torch.no_grad(), record_consumers(backbone) as consumers:
        backbone(torch.randn(1, 3, 64, 64))
    kinds = [type(m) for m in backbone.modules()]
    assert BCN in kinds and nn.BatchNorm2d not in kinds
    assert all(
        consumers.only_normalizations(m)
        for m in backbone.modules()
        if isinstance(m, ConvWS)
    )


def test_fixed_normalizations_of_a_neck_are_told():
    """Found by the sweep of the zoos: its cells have BN, whatever we say."""
    path = 'nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py'
    path = f'mmdet::nas_fcos/{path}'
    with pytest.warns(UserWarning, match='NASFCOS_FPN'):
        micro_batch_model(zoo(path), convert=False)
    assert converted(path).type == 'ConvertedModel'
