"""Convert a BCN + WS checkpoint of the method's authors to the MM libraries.

Their ImageNet classifiers become MMPretrain's, their DeepLabV3
MMSegmentation's. Beside the checkpoint a config of its model is written, with
the form of Weight Standardization that it was trained with: their ImageNet
code adds eps inside the square root, ``eps_inside_sqrt=True``.

The checkpoints are those of
https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization.
"""

import argparse
import importlib
import re
from typing import Dict

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import get_state_dict
from torch import Tensor

from wsbcn_mm.engine.checkpoint import publish, read_checkpoint
from wsbcn_mm.engine.command_line import UsageError, run
from wsbcn_mm.layers.checkpoint_layouts import authors_weight_function

# Blocks in the four stages, and whether they are bottlenecks.
DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help="the authors' checkpoint")
    parser.add_argument(
        'out', help='the file to write, to whose name a hash is added'
    )
    return parser.parse_args()


def backbone_config(state: Dict[str, Tensor]) -> dict:
    """Return the config of the ResNet or ResNeXt that a checkpoint is of."""
    blocks = tuple(
        len({k.split('.')[1] for k in state if k.startswith(f'layer{i}.')})
        for i in range(1, 5)
    )
    depth = DEPTHS.get((blocks, 'layer1.0.conv3.weight' in state))
    if depth is None or 'conv1.weight' not in state:
        raise UsageError(
            f'the backbone has stages of {blocks} blocks; expected a ResNet '
            f'or ResNeXt with a 7x7 stem and {sorted(DEPTHS)} blocks.'
        )
    cfg = dict(
        type='ResNet',
        depth=depth,
        conv_cfg=dict(
            type='ConvWS',
            eps_inside_sqrt=authors_weight_function(state)['eps_inside_sqrt'],
        ),
        # Running averages and their rate are those of BN in this code.
        norm_cfg=dict(
            type='BCN',
            num_groups=state['bn1.weight'].numel(),
            estimate=False,
            momentum=0.1,
        ),
    )
    inside = state['layer1.0.conv2.weight']
    if len(inside) != inside.shape[1]:
        width = inside.shape[1]
        cfg.update(
            type='ResNeXt', groups=len(inside) // width, width_per_group=width
        )
    return cfg


def classifier_config(state: Dict[str, Tensor]) -> dict:
    """Return the config of MMPretrain's classifier."""
    classes, channels = state['fc.weight'].shape
    return dict(
        default_scope='mmpretrain',
        custom_imports=dict(imports=['wsbcn_mm']),
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(
                num_classes=classes, mean=MEAN, std=STD, to_rgb=True
            ),
            backbone=backbone_config(state),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=classes,
                in_channels=channels,
                loss=dict(type='CrossEntropyLoss'),
            ),
        ),
    )


def segmentor_config(state: Dict[str, Tensor]) -> dict:
    """Return the config of MMSegmentation's DeepLabV3."""
    backbone = backbone_config(state)
    channels, in_channels = state['aspp.aspp1.weight'].shape[:2]
    return dict(
        default_scope='mmseg',
        custom_imports=dict(imports=['wsbcn_mm', 'wsbcn_mm.models']),
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor',
                mean=MEAN,
                std=STD,
                bgr_to_rgb=True,
                pad_val=0,
                seg_pad_val=255,
                size=(513, 513),
                test_cfg=dict(size=(513, 513)),
            ),
            backbone=dict(
                backbone,
                strides=(1, 2, 2, 1),
                dilations=(1, 1, 1, 2),
                contract_dilation=True,
            ),
            decode_head=dict(
                type='PointwiseASPPHead',
                in_channels=in_channels,
                in_index=3,
                channels=channels,
                dilations=(1, 6, 12, 18),
                dropout_ratio=0,
                num_classes=len(state['aspp.conv3.weight']),
                conv_cfg=backbone['conv_cfg'],
                norm_cfg=backbone['norm_cfg'],
                align_corners=True,
            ),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        ),
    )


def rename(key: str) -> str:
    """Return what an MM library calls a parameter of the authors'."""
    match = re.fullmatch(r'aspp\.aspp(\d)(_bn)?\.(.+)', key)
    if match:
        number, is_norm, rest = match.groups()
        part = (
            'image_pool.1'
            if number == '5'
            else f'aspp_modules.{int(number) - 1}'
        )
        return f'decode_head.{part}.{"bn" if is_norm else "conv"}.{rest}'
    for old, new in (
        ('aspp.conv2.', 'decode_head.bottleneck.conv.'),
        ('aspp.bn2.', 'decode_head.bottleneck.bn.'),
        ('aspp.conv3.', 'decode_head.conv_seg.'),
        ('fc.', 'head.fc.'),
    ):
        if key.startswith(old):
            return new + key[len(old) :]
    return f'backbone.{key}'


def main():
    args = parse_args()
    state = read_checkpoint(args.checkpoint)['state_dict']
    if authors_weight_function(state) is None:
        raise UsageError(
            f'{args.checkpoint!r} is not of the BCN + WS code of the authors: '
            "no key ends with 'pbn.running_mean'. For other checkpoints there "
            'is normalization.py.'
        )
    is_segmentor = 'aspp.conv2.weight' in state
    if not is_segmentor and 'fc.weight' not in state:
        raise UsageError(
            f'{args.checkpoint!r} has neither their classifier (fc.weight) '
            'nor their DeepLabV3 head (aspp.conv2.weight).'
        )
    cfg = Config(
        (segmentor_config if is_segmentor else classifier_config)(state)
    )
    for name in (*cfg.custom_imports.imports, cfg.default_scope):
        importlib.import_module(name)
    init_default_scope(cfg.default_scope)
    # In the precision of the checkpoint, of which nothing is lost.
    model = MODELS.build(cfg.model).to(state['conv1.weight'].dtype)
    state = {rename(key): value for key, value in state.items()}
    if is_segmentor:
        # The image pooling is the last input there, and the first here.
        key = 'decode_head.bottleneck.conv.weight'
        state[key] = state[key].roll(cfg.model.decode_head.channels, 1)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(
            f'{args.checkpoint!r} is not of the network that its keys say: '
            f'{error}'
        ) from error
    meta = dict(cfg=cfg.pretty_text)
    path = publish(dict(state_dict=get_state_dict(model), meta=meta), args.out)
    config = re.sub(r'\.pth$', '.py', path)
    cfg.dump(config)
    print(
        f'Wrote {path}, and {config} with its model: '
        f'conv_cfg={cfg.model.backbone.conv_cfg.to_dict()}, '
        f'norm_cfg={cfg.model.backbone.norm_cfg.to_dict()}.'
    )


if __name__ == '__main__':
    torch.manual_seed(0)
    run(main)
