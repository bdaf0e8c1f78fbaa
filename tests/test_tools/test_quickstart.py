"""What the quickstart leaves: metrics, a table, a picture."""

import importlib.util
import json
import os.path as osp
import sys

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

TOOLS = osp.join(osp.dirname(__file__), '../../tools')


def tool(path):
    spec = importlib.util.spec_from_file_location(
        osp.basename(path), osp.join(TOOLS, f'{path}.py')
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def called(monkeypatch, path, *arguments):
    monkeypatch.setattr(sys, 'argv', [path, *map(str, arguments)])
    tool(path).main()


METRICS = {
    'bbox_mAP': 0.61,
    'bbox_mAP_50': 0.92,
    'segm_mAP': 0.58,
    'segm_mAP_50': 0.91,
}


def leave_metrics(work_dir, time, metrics):
    folder = work_dir / 'test' / time
    folder.mkdir(parents=True)
    (folder / f'{time}.json').write_text(
        json.dumps({f'coco/{k}': v for k, v in metrics.items()})
    )


def test_report_writes_and_shows_the_metrics(tmp_path, monkeypatch, capsys):
    leave_metrics(tmp_path, '20200101_000000', METRICS)
    called(monkeypatch, 'quickstart_report', tmp_path, '--seconds=321')
    written = json.loads((tmp_path / 'metrics.json').read_text())
    assert written == {**METRICS, 'seconds': 321}
    shown = capsys.readouterr().out
    for part in ('0.580', '0.910', '321 s', 'mask-rcnn_r50_fpn_bcn-ws'):
        assert part in shown
    called(monkeypatch, 'quickstart_report', tmp_path)  # shows it again
    assert capsys.readouterr().out == shown


def test_report_of_a_resumed_run_says_so(tmp_path, monkeypatch, capsys):
    leave_metrics(tmp_path, '20200101_000000', METRICS)
    called(
        monkeypatch,
        'quickstart_report',
        tmp_path,
        '--seconds=3',
        '--resumed',
    )
    assert json.loads((tmp_path / 'metrics.json').read_text())['resumed']
    assert 'since it was resumed' in capsys.readouterr().out


def test_report_without_evaluation_invents_nothing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='no metrics'):
        called(monkeypatch, 'quickstart_report', tmp_path, '--seconds=3')
    assert not (tmp_path / 'metrics.json').exists()


@pytest.fixture
def scene(tmp_path):
    """One grey image with one object; where it lies."""
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 20:40] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    rle['counts'] = rle['counts'].decode()
    thing = dict(
        image_id=7,
        category_id=4,
        bbox=[20, 10, 20, 20],
        area=400,
        iscrowd=0,
        segmentation=rle,
    )
    (tmp_path / 'truth.json').write_text(
        json.dumps(
            dict(
                images=[dict(id=7, file_name='a.png', width=64, height=64)],
                annotations=[dict(thing, id=1)],
                categories=[dict(id=4, name='3')],
            )
        )
    )
    cv2.imwrite(str(tmp_path / 'a.png'), np.full((64, 64, 3), 128, np.uint8))

    def predict(score):
        (tmp_path / 'results.json').write_text(
            json.dumps([dict(thing, score=score)])
        )
        return [
            tmp_path / 'truth.json',
            tmp_path,
            tmp_path / 'results.json',
            f'--out={tmp_path / "picture.png"}',
        ]

    return predict


def coloured(path):
    """Whether there is colour in the upper and in the lower half."""
    picture = cv2.imread(str(path)).astype(int)
    spread = picture.max(2) - picture.min(2)
    half = len(picture) // 2
    return spread[:half].max() > 60, spread[half:].max() > 60


@pytest.mark.parametrize('score, drawn', [(0.9, True), (0.3, False)])
def test_picture_shows_truth_above_prediction(
    scene, score, drawn, tmp_path, monkeypatch
):
    called(monkeypatch, 'visualization/prediction_picture', *scene(score))
    assert coloured(tmp_path / 'picture.png') == (True, drawn)


def test_picture_of_missing_files_is_one_line(scene, tmp_path, monkeypatch):
    arguments = scene(0.9)
    (tmp_path / 'results.json').unlink()
    with pytest.raises(SystemExit, match='results.json does not exist'):
        called(monkeypatch, 'visualization/prediction_picture', *arguments)
