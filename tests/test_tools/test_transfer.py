"""The way from a classifier of crops to a detector of scenes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import save_checkpoint
from mmengine.runner.checkpoint import get_state_dict

from wsbcn_mm.engine.checkpoint import read_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'digits_transfer'
CLASSIFIER = 'resnet18-slim_bcn-ws_1xb16-4e_digit-crops.py'
SCRATCH = 'mask-rcnn_r18-slim-scratch_fpn_bcn-ws_1xb1-400_digits.py'
TRANSFER = 'mask-rcnn_r18-slim_fpn_bcn-ws_1xb1-400_digits.py'


def run(monkeypatch, tool, *arguments):
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')


def test_crops_are_those_of_the_annotations(tmp_path, monkeypatch):
    pytest.importorskip('sklearn')
    pytest.importorskip('mmpretrain')
    scenes, crops = tmp_path / 'scenes', tmp_path / 'crops'
    run(
        *(monkeypatch, 'dataset_converters/digit_scenes.py'),
        *('--out', scenes, '--num-train', 3, '--num-val', 2),
    )
    run(
        *(monkeypatch, 'dataset_converters/digit_crops.py'),
        *('--scenes', scenes, '--out', crops),
    )
    cfg = read_config(str(CONFIGS / CLASSIFIER))
    for split, loader in (
        ('train', cfg.train_dataloader),
        ('val', cfg.val_dataloader),
    ):
        loader.dataset.data_root = f'{crops}/'
        dataset = DATASETS.build(loader.dataset)
        path = scenes / 'annotations' / f'instances_{split}.json'
        coco = json.loads(path.read_text())
        names = {c['id']: c['name'] for c in coco['categories']}
        labels = sorted(
            int(names[a['category_id']]) for a in coco['annotations']
        )
        assert sorted(dataset.get_gt_labels()) == labels
        assert dataset[0]['inputs'].shape == (3, 48, 48)


def test_crops_without_scenes(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='Make the scenes first'):
        run(
            *(monkeypatch, 'dataset_converters/digit_crops.py'),
            *('--scenes', tmp_path / 'none'),
        )


def test_the_detector_starts_from_the_classifier(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    classifier = MODELS.build(read_config(str(CONFIGS / CLASSIFIER)).model)
    for value in classifier.backbone.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1)
        else:
            value.fill_(3)  # forwards
    path = tmp_path / 'epoch_4.pth'
    save_checkpoint(
        dict(state_dict=get_state_dict(classifier), meta={}), str(path)
    )
    run(
        *(monkeypatch, 'model_converters/backbone.py'),
        *(path, tmp_path / 'r18.pth'),
    )
    (published,) = tmp_path.glob('r18-*.pth')
    cfg = read_config(str(CONFIGS / TRANSFER))
    cfg.model.backbone.init_cfg.checkpoint = str(published)
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    wanted = classifier.backbone.state_dict()
    assert detector.backbone.state_dict().keys() == wanted.keys()
    for key, value in detector.backbone.state_dict().items():
        assert torch.equal(value, wanted[key])


def test_the_two_differ_in_where_they_start_only():
    transfer, scratch = (
        read_config(str(CONFIGS / name)) for name in (TRANSFER, SCRATCH)
    )
    assert transfer.model.backbone.pop('init_cfg') is not None
    assert scratch.model.backbone.pop('init_cfg', None) is None
    assert transfer.to_dict() == scratch.to_dict()
    assert transfer.train_cfg.max_iters == 400
