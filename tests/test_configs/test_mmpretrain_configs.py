"""The ResNet configs: they parse, say what their names say, and train."""

from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import BCN, ConvWS, update_rate
from wsbcn_mm.layers._base import NormBase

FOLDER = Path(__file__).parents[2] / 'configs' / 'resnet'
PATHS = sorted(FOLDER.glob('*.py'))


def parts(path: Path):
    """Depth, normalization, images in a pass and data, from a file name."""
    network, norm, images, data = path.stem.split('_')
    depth = int(network.replace('resnet', ''))
    return depth, norm, int(images.replace('1xb', '')), data


def build(cfg: Config) -> nn.Module:
    init_default_scope('mmpretrain')
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def test_every_combination_is_there():
    names = {path.stem for path in PATHS}
    expected = {
        f'resnet{depth}_{norm}_1xb{images}_{data}'
        for norm, images in product(('bcn-ws', 'gn-ws'), (1, 2))
        for depth, data in (
            *product((18, 50, 101), ('in1k',)),
            *product((18, 110), ('cifar10', 'cifar100')),
        )
    }
    assert names == expected


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_config_says_what_its_name_says(path):
    cfg = Config.fromfile(path)
    depth, norm, images, data = parts(path)
    # The authors' batch of ResNet-101, with the learning rate of 256.
    step = 256 if data == 'in1k' and depth != 101 else 128
    assert cfg.train_dataloader.batch_size == images
    assert cfg.optim_wrapper.accumulative_counts * images == step
    # mmengine counts the images of an iteration, without accumulation.
    assert cfg.auto_scale_lr.base_batch_size == images
    assert cfg.optim_wrapper.optimizer.lr == 0.1
    epochs, milestones, decay = {
        (18, 'in1k'): (100, [30, 60, 90], 1e-4),
        (50, 'in1k'): (90, [30, 60], 1e-4),
        (101, 'in1k'): (100, [30, 60, 90], 1e-4),
        (18, 'cifar10'): (200, [100, 150], 1e-4),
        (18, 'cifar100'): (200, [60, 120, 160], 5e-4),
        (110, 'cifar10'): (164, [81, 122], 1e-4),
        (110, 'cifar100'): (164, [81, 122], 1e-4),
    }[depth, data]
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler.milestones == milestones
    assert cfg.param_scheduler.gamma == (0.2 if decay == 5e-4 else 0.1)
    assert cfg.optim_wrapper.optimizer.weight_decay == decay
    assert 'wsbcn_mm' in cfg.custom_imports.imports

    classes = {'in1k': 1000, 'cifar10': 10, 'cifar100': 100}[data]
    assert cfg.model.head.num_classes == classes
    assert cfg.data_preprocessor.num_classes == classes
    backbone = cfg.model.backbone
    assert backbone.depth == depth
    assert backbone.conv_cfg == dict(type='ConvWS')
    groups = 4 if depth == 110 else 32
    if norm == 'bcn-ws':
        rate = update_rate(images, step)
        assert backbone.norm_cfg == dict(
            type='BCN',
            num_groups=groups,
            momentum=rate,
            momentum_annealing=True,
        )
    else:
        assert backbone.norm_cfg == dict(type='GN', num_groups=groups)


@pytest.mark.parametrize(
    'name', ['resnet110_bcn-ws_1xb2_cifar100', 'resnet50_gn-ws_1xb1_in1k']
)
def test_dumped_config_is_the_same_model(name, tmp_path):
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    cfg.dump(tmp_path / 'config.py')
    again = Config.fromfile(tmp_path / 'config.py')
    assert again.to_dict() == cfg.to_dict()


def assert_trains(path: Path) -> None:
    cfg = Config.fromfile(path)
    depth, norm, images, data = parts(path)
    torch.manual_seed(0)
    model = build(cfg).train()
    layers = list(model.modules())
    assert not any(
        isinstance(m, _BatchNorm) and not isinstance(m, NormBase)
        for m in layers
    )
    kind = BCN if norm == 'bcn-ws' else nn.GroupNorm
    norms = [m for m in layers if isinstance(m, kind)]
    convs = [m for m in layers if isinstance(m, nn.Conv2d)]
    assert len(norms) == len(convs) > depth - 2
    assert all(isinstance(m, ConvWS) for m in convs)

    size = 64 if data == 'in1k' else 32
    inputs = [
        torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
        for _ in range(images)
    ]
    samples = [DataSample().set_gt_label(i) for i in range(images)]
    batch = model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), True
    )
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.isfinite().all(), name


FAST = [p for p in PATHS if 'resnet18' in p.name and '1xb1' in p.name]


@pytest.mark.parametrize('path', FAST, ids=lambda path: path.stem)
def test_trains(path):
    assert_trains(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    'path', [p for p in PATHS if p not in FAST], ids=lambda path: path.stem
)
def test_other_trains(path):
    assert_trains(path)


def test_metafile_lists_every_config():
    metafile = yaml.safe_load((FOLDER / 'metafile.yml').read_text())
    collections = {c['Name'] for c in metafile['Collections']}
    models = metafile['Models']
    assert {m['Config'] for m in models} == {
        f'configs/resnet/{path.name}' for path in PATHS
    }
    for model in models:
        assert model['In Collection'] in collections
        assert 'Results' not in model  # none was run
        cfg = Config.fromfile(FOLDER.parents[1] / model['Config'])
        images = cfg.train_dataloader.batch_size
        assert model['Metadata']['Epochs'] == cfg.train_cfg.max_epochs
        assert model['Metadata']['Images per GPU'] == images
        assert model['Metadata']['Batch Size'] == (
            images * cfg.optim_wrapper.accumulative_counts
        )
