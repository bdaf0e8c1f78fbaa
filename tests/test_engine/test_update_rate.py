from pathlib import Path

import pytest
from mmengine.config import Config
from torch import nn

from wsbcn_mm import BCN, SyncBCN, micro_batch_model, update_rate
from wsbcn_mm.engine.update_rate import rate_contradiction

CONFIGS = Path(__file__).parents[2] / 'configs'


def test_rate_follows_images_per_update():
    assert update_rate(1, 16) == pytest.approx(0.01 / 16)
    assert update_rate(2, 16) == pytest.approx(0.01 / 8)
    assert update_rate(16, 16) == pytest.approx(0.01)
    assert update_rate() == update_rate(1, 16)
    assert update_rate(2, 64) == pytest.approx(0.01 / 32)


def test_memory_spans_enough_images():
    assert update_rate(1, 1) == update_rate(1, 2) == update_rate(1, 16)
    assert update_rate(2, 2) == update_rate(2, 16)


@pytest.mark.parametrize('images', [(1.5, 16), ('1', 16), (True, 16)])
def test_type(images):
    with pytest.raises(TypeError, match='images_per_gpu.*positive integer'):
        update_rate(*images)


def test_value():
    with pytest.raises(ValueError, match='update_rate: images_per_gpu.*got 0'):
        update_rate(0, 16)
    with pytest.raises(ValueError, match='images_per_update.*got -16'):
        update_rate(1, -16)
    with pytest.raises(ValueError, match='at least images_per_gpu'):
        update_rate(4, 2)


def layers(*rates, kind=BCN, annealing=True):
    return nn.ModuleList(
        kind(64, momentum=rate, momentum_annealing=annealing) for rate in rates
    )


def test_rate_of_other_images_is_told():
    """The default, 1 of 16, where a config says batch_size=2."""
    told = rate_contradiction(layers(0.000625, 0.000625), batch_size=2)
    for part in (
        '2 BCN layers have momentum=0.000625',
        'batch_size=2, accumulative_counts=1, 1 process,',
        '0.00125 is proposed',
        'images_per_gpu=2, images_per_update=2.',
        'on purpose needs nothing',
    ):
        assert part in told
    assert rate_contradiction(layers(0.00125), batch_size=2) is None
    assert rate_contradiction(layers(0.000625), 2, 16) is None
    assert rate_contradiction(layers(0.000625), 1, 16) is None


def test_rate_of_several_processes():
    """Estimates that are shared learn from all images of an iteration."""
    alone = dict(batch_size=1, accumulative_counts=4, world_size=4)
    assert rate_contradiction(layers(0.000625), **alone) is None
    told = rate_contradiction(layers(0.000625), **alone, shared=True)
    assert 'images_per_gpu=4, images_per_update=16' in told
    assert rate_contradiction(layers(0.0025), **alone, shared=True) is None
    assert rate_contradiction(layers(0.0025, kind=SyncBCN), **alone) is None


@pytest.mark.parametrize('rate', [None, 0.002, 0.001, 0.0006, 0.0])
def test_chosen_rates_need_nothing(rate):
    assert rate_contradiction(layers(rate), batch_size=2) is None


def test_rates_that_are_not_annealed_were_chosen():
    assert rate_contradiction(layers(0.1, annealing=False), 1) is None
    large = nn.ModuleList(
        [BCN(64, estimate=False, momentum=0.1, momentum_annealing=True)]
    )
    assert rate_contradiction(large, 1) is None


@pytest.mark.parametrize('images', [(1, 16), (2, 16), (4, 24), (3, 512)])
def test_derived_rates_are_known(images):
    model = dict(type='ResNet', depth=18)
    norm_cfg = micro_batch_model(
        dict(type='ImageClassifier', backbone=model),
        images_per_gpu=images[0],
        images_per_update=images[1],
    ).backbone.norm_cfg
    assert rate_contradiction(layers(norm_cfg.momentum), batch_size=16)


def norm_cfgs(cfg):
    if isinstance(cfg, dict):
        if cfg.get('type') == 'BCN':
            yield cfg
        cfg = list(cfg.values())
    if isinstance(cfg, list):
        for part in cfg:
            yield from norm_cfgs(part)


@pytest.mark.filterwarnings('ignore:micro_batch_model')
@pytest.mark.parametrize(
    'path',
    [
        path
        for pattern in (
            'digits/*_bcn-ws_*',
            'mask_rcnn/*_r50_fpn_bcn-ws-all_*-1x_*',
            'deeplabv3*/*_r50b-d8_bcn-ws_*512x1024*',
            'resnet/resnet18_bcn-ws_*_cifar10.py',
        )
        for path in sorted(CONFIGS.glob(pattern))
    ],
    ids=lambda path: path.stem,
)
def test_own_configs_agree_with_themselves(path):
    cfg = Config.fromfile(path)
    model = nn.ModuleList(
        BCN(64, **{k: v for k, v in norm.items() if k != 'type'})
        for norm in norm_cfgs(cfg.model)
    )
    assert len(model)
    counts = cfg.optim_wrapper.get('accumulative_counts', 1)
    batch_size = cfg.train_dataloader.batch_size
    assert rate_contradiction(model, batch_size, counts, 1, True) is None
    if counts * batch_size >= 16:  # else more GPUs make for larger steps
        assert rate_contradiction(model, batch_size, counts, 4, True) is None
