"""The configs of this package: they parse, build and train."""

import copy
import functools
import json
from pathlib import Path

import authors
import mmcv
import numpy as np
import pytest
import torch
import yaml
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from training_step import assert_trains, training_step

from wsbcn_mm import BCN, ConvWS, SyncBCN, update_rate

ROOT = Path(__file__).parents[2]
FOLDERS = ('mask_rcnn', 'deeplabv3', 'deeplabv3plus')
ALL_PATHS = [
    p for f in FOLDERS for p in sorted((ROOT / 'configs' / f).glob('*.py'))
]
# The setting that the authors published mIoU of: large batches.
VOC = 'deeplabv3_r101-d16_sync-bcn-ws_4xb4-50e_voc12aug-513x513'
PATHS = [p for p in ALL_PATHS if p.stem != VOC]


def walk(cfg):
    if isinstance(cfg, dict):
        yield cfg
        for value in cfg.values():
            yield from walk(value)


def load(name: str) -> Config:
    folder = name.split('_')[0].replace('mask-rcnn', 'mask_rcnn')
    return Config.fromfile(ROOT / 'configs' / folder / f'{name}.py')


@pytest.fixture(scope='module')
def read():
    """Config.fromfile that reads a file once however many inherit from it."""
    file2dict = functools.lru_cache(maxsize=None)(Config._file2dict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Config,
            '_file2dict',
            staticmethod(lambda *a, **k: copy.deepcopy(file2dict(*a, **k))),
        )
        yield Config.fromfile


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_config_says_what_its_name_says(path, read):
    cfg = read(path)
    name = path.stem
    images = cfg.train_dataloader.batch_size
    counts = cfg.optim_wrapper.accumulative_counts
    optimizer_batch = 8 if 'cityscapes' in name else 16
    assert f'_1xb{images}-' in name
    assert images * counts == optimizer_batch
    # mmengine counts the images of an iteration, without accumulation.
    assert cfg.auto_scale_lr.base_batch_size == images
    assert cfg.custom_imports.imports == ['wsbcn_mm']

    backbone = cfg.model.backbone
    assert backbone.depth == (101 if '101' in name.split('_')[1] else 50)
    assert (backbone.type == 'ResNeXt') == ('_x' in name)
    assert backbone.conv_cfg == dict(type='ConvWS')
    assert backbone.get('frozen_stages', -1) == -1
    assert not backbone.norm_eval
    if '-scratch' in name:
        assert 'init_cfg' not in backbone
        assert not backbone.zero_init_residual
    else:
        network = f'resnet{backbone.depth}'
        if backbone.type == 'ResNeXt':
            network = f'resnext{backbone.depth}_32x4d'
            assert (backbone.groups, backbone.base_width) == (32, 4)
        checkpoint = f'open-mmlab://jhu/{network}_gn_ws'
        assert backbone.init_cfg.checkpoint == checkpoint
        assert cfg.model.get('pretrained') is None
    if '_bcn-ws' in name:
        affine = backbone.norm_cfg.get('channel_affine', 'group')
        assert affine == ('group' if '-scratch' in name else 'channel')
        rate = update_rate(images, optimizer_batch)
        assert backbone.norm_cfg.momentum == pytest.approx(rate)
    else:
        assert backbone.norm_cfg == dict(type='GN', num_groups=32)

    schedulers = cfg.param_scheduler
    if 'mask-rcnn' in name:
        warm_up, decay = schedulers
        assert warm_up.end == 500 * counts and not warm_up.by_epoch
        assert warm_up.start_factor == pytest.approx(1 / 3)
        epochs, milestones = {
            '1x': (12, [8, 11]),
            '2x': (24, [16, 22]),
            '20-23-24e': (24, [20, 23]),
        }[name.split(f'_1xb{images}-')[1].split('_')[0]]
        assert cfg.train_cfg.max_epochs == decay.end == epochs
        assert decay.milestones == milestones and decay.by_epoch
    else:
        # The zoo's 80k steps of 8 images, or 40k steps of 16.
        iterations = 640_000 // images
        assert f'-{iterations // 1000}k_' in name
        assert cfg.train_cfg.max_iters == schedulers[-1].end == iterations
        assert cfg.train_cfg.val_interval * 10 == iterations
        assert cfg.default_hooks.checkpoint.interval * 10 == iterations


def test_every_combination_is_there():
    names = {p.stem for p in PATHS}
    for start in ('', '-scratch'):
        for depth in (50, 101):
            for norm in ('bcn', 'gn'):
                for images in (1, 2):
                    for schedule in ('1x', '2x', '20-23-24e'):
                        assert (
                            f'mask-rcnn_r{depth}{start}_fpn_{norm}-ws-all_'
                            f'1xb{images}-{schedule}_coco'
                        ) in names
    for norm in ('bcn', 'gn'):  # as many images a GPU as the authors
        for network, images in (('x50', 2), ('x101', 1)):
            assert (
                f'mask-rcnn_{network}-32x4d_fpn_{norm}-ws-all_1xb{images}-'
                '20-23-24e_coco'
            ) in names
    assert len(names) == 100


@pytest.mark.parametrize(
    'name',
    [
        'mask-rcnn_r50_fpn_bcn-ws-all_1xb1-1x_coco',
        'mask-rcnn_r50-scratch_fpn_gn-ws-all_1xb2-2x_coco',
    ],
)
def test_the_box_head_and_the_biases_are_those_of_the_authors(name):
    cfg = load(name)
    cfg.model.backbone.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        model.init_weights()
    convs = model.roi_head.bbox_head.shared_convs
    for layer in convs:
        assert layer.conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert layer.norm.weight.eq(1).all()
    # As wide as FCNMaskHead and mmdet's box head have them elsewhere.
    assert model.roi_head.mask_head.convs[0].conv.weight.std() > 0.02
    head = model.roi_head.bbox_head
    assert head.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.fc_reg.weight.std().item() == pytest.approx(0.001, rel=0.02)
    bound = (6 / (256 * 49 + 1024)) ** 0.5
    assert head.shared_fcs[0].weight.abs().max() <= bound * 1.001
    assert head.shared_fcs[0].weight.abs().max() >= bound * 0.99

    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.optimizer.param_groups:
        (name,) = [names[id(p)] for p in group['params']]
        is_bias = 'bias' in name
        assert group['lr'] == pytest.approx(0.04 if is_bias else 0.02)
        assert group['weight_decay'] == (0 if is_bias else 1e-4)


def test_voc_is_the_setting_of_the_authors():
    """Their DeepLabV3, as tests/authors.py has it."""
    cfg = load(VOC)
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.optim_wrapper.optimizer.lr == 0.007
    assert cfg.optim_wrapper.optimizer.weight_decay == 1e-4
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[0].end == 33100
    assert cfg.param_scheduler[0].eta_min == 0
    for dataset in cfg.train_dataloader.dataset.datasets:
        crops = [t for t in dataset.pipeline if 'Crop' in t['type']]
        assert crops == [dict(type='RandomCrop', crop_size=(513, 513))]
    cfg.model.backbone.pop('init_cfg')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).double().eval()
    norms = [m for m in model.modules() if isinstance(m, BCN)]
    assert all(type(m) is SyncBCN and not m.estimate for m in norms)
    assert all(m.momentum == 0.1 and len(m.weight) == 32 for m in norms)
    assert not model.with_auxiliary_head
    theirs = authors.deeplab((3, 4, 23, 3))
    backbone = {
        k: v for k, v in theirs.state_dict().items() if 'aspp' not in k
    }
    model.backbone.load_state_dict(backbone)
    x = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        got, wanted = model.backbone(x)[-1], theirs.features(x)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        assert got.shape[2:] == (5, 5)  # output stride 16
        assert model(x, mode='tensor').shape == (1, 21, 5, 5)


def test_voc_reads_images_as_the_authors_did(tmp_path):
    """Half to twice their size, cropped; and in the test as they are."""
    cfg = load(VOC)
    image, labels = tmp_path / 'image.png', tmp_path / 'labels.png'
    colors = np.random.default_rng(0).integers(0, 255, (400, 500, 3))
    mmcv.imwrite(colors.astype(np.uint8), str(image))
    mmcv.imwrite(np.ones((400, 500), np.uint8), str(labels))
    example = dict(
        img_path=str(image),
        seg_map_path=str(labels),
        reduce_zero_label=False,
        seg_fields=[],
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        pipelines = [
            Compose(p)
            for p in (
                cfg.train_dataloader.dataset.datasets[0].pipeline,
                cfg.val_dataloader.dataset.pipeline,
            )
        ]
        preprocess = MODELS.build(cfg.model.data_preprocessor)
    sizes = set()
    for _ in range(20):
        packed = pipelines[0](copy.deepcopy(example))
        sizes.add(tuple(packed['inputs'].shape[1:]))
        batch = dict(
            inputs=[packed['inputs']], data_samples=[packed['data_samples']]
        )
        batch = preprocess(batch, training=True)
        assert batch['inputs'].shape == (1, 3, 513, 513)
        labels = batch['data_samples'][0].gt_sem_seg.data
        assert labels.shape == (1, 513, 513)
        assert set(labels.unique().tolist()) <= {1, 255}
    heights, widths = zip(*sizes)
    assert min(heights) < 300 and max(heights) == max(widths) == 513
    packed = pipelines[1](copy.deepcopy(example))
    assert packed['inputs'].shape == (3, 400, 500)
    batch = dict(
        inputs=[packed['inputs']], data_samples=[packed['data_samples']]
    )
    assert preprocess(batch)['inputs'].shape == (1, 3, 513, 513)


def test_dumped_config_reloads_the_same(tmp_path):
    cfg = load('mask-rcnn_r50_fpn_gn-ws-all_1xb1-1x_coco')
    cfg.dump(tmp_path / 'dumped.py')
    dumped = Config.fromfile(tmp_path / 'dumped.py')
    assert dumped.to_dict() == cfg.to_dict()


def test_metafiles_list_the_configs():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    listed = set()
    for metafile in index['Import']:
        assert (ROOT / metafile).is_file()
        content = yaml.safe_load((ROOT / metafile).read_text())
        collections = {c['Name'] for c in content.get('Collections', [])}
        for model in content['Models']:
            assert model['In Collection'] in collections
            path = ROOT / model['Config']
            assert path.is_file()
            listed.add(path)
            if path in ALL_PATHS:  # not trained: no result may be claimed
                assert 'Results' not in model and 'Weights' not in model
    assert listed >= set(ALL_PATHS)


def check_form(model) -> None:
    """WS where a normalization follows, and nowhere else."""
    norms = [
        m for m in model.modules() if isinstance(m, (BCN, torch.nn.GroupNorm))
    ]
    standardized = [m for m in model.modules() if isinstance(m, ConvWS)]
    assert norms and standardized
    assert not any(type(m) is torch.nn.BatchNorm2d for m in model.modules())
    plain = {
        name
        for name, m in model.named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
        and not isinstance(m, ConvWS)
    }
    outputs = {
        'rpn_head.rpn_conv',
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.mask_head.upsample',
        'roi_head.mask_head.conv_logits',
        'decode_head.conv_seg',
        'auxiliary_head.conv_seg',
    }
    # mmseg's depthwise separable convolutions take no conv_cfg.
    separable = {n for n in plain if 'depthwise' in n or 'pointwise' in n}
    assert plain - separable <= outputs
    assert all(c.bias is None for c in standardized)


# The networks that differ in more than what the input data ask for, which
# test_every_full_size_model_builds does not leave out.
FAST = [
    'mask-rcnn_r50_fpn_bcn-ws-all_1xb1-1x_coco',
    'deeplabv3plus_r50b-d8_bcn-ws_1xb1-640k_cityscapes-512x1024',
]
ALL = [
    f'mask-rcnn_r{depth}{start}_fpn_{norm}-ws-all_1xb1-1x_coco'
    for depth in (50, 101)
    for start in ('', '-scratch')
    for norm in ('bcn', 'gn')
] + [
    f'{head}_r{depth}b-d8_{norm}-ws_1xb1-640k_cityscapes-512x1024'
    for head in ('deeplabv3', 'deeplabv3plus')
    for depth in (50, 101)
    for norm in ('bcn', 'gn')
]


@pytest.mark.parametrize(
    'name',
    FAST
    + [pytest.param(n, marks=pytest.mark.slow) for n in ALL if n not in FAST],
)
def test_full_size_model_trains_on_one_image(name):
    cfg = load(name)
    size = (65, 65)
    if 'mask-rcnn' in name:
        size = (64, 96)
        cfg.model.train_cfg.rcnn.sampler.num = 8  # not 512 RoIs, for speed
    model, loss = training_step(cfg.model, cfg.default_scope, size)
    assert_trains(model, loss)
    check_form(model)
    assert any(isinstance(m, BCN) for m in model.modules()) == (
        '_bcn-ws' in name
    )


@pytest.mark.slow
def test_every_full_size_model_builds(read):
    built = set()
    for path in PATHS:
        model = read(path).model
        for part in walk(model):
            part.pop('momentum', None)
        key = json.dumps(model.to_dict(), sort_keys=True, default=str)
        if key in built:
            continue
        built.add(key)
        scope = 'mmdet' if 'mask-rcnn' in path.stem else 'mmseg'
        with torch.device('meta'), DefaultScope.overwrite_default_scope(scope):
            check_form(MODELS.build(model))
    assert len(built) == 8 + 4 + 24


@pytest.mark.slow
def test_full_resolution():
    cfg = load('mask-rcnn_r50_fpn_bcn-ws-all_1xb1-1x_coco')
    cfg.model.train_cfg.rcnn.sampler.num = 64
    assert_trains(*training_step(cfg.model, 'mmdet', (800, 1216)))


def test_image_pooling_and_narrow_decoder():
    """Where BN raises at one image, and GN(32) cannot be built."""
    cfg = load('deeplabv3plus_r50b-d8_bcn-ws_1xb1-640k_cityscapes-512x1024')
    head = cfg.model.decode_head
    assert head.c1_channels == 48 and head.norm_cfg.num_groups == 32
    cfg = load('deeplabv3plus_r50b-d8_gn-ws_1xb1-640k_cityscapes-512x1024')
    assert cfg.model.decode_head.norm_cfg.num_groups == 16
    assert cfg.model.backbone.norm_cfg.num_groups == 32
