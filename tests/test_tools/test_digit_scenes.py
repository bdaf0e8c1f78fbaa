"""The digit scenes, by what their readers see."""

import filecmp
import glob
import importlib.util
import json
import os
import os.path as osp
import re
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

TOOL = osp.join(
    osp.dirname(__file__), '../../tools/dataset_converters/digit_scenes.py'
)
spec = importlib.util.spec_from_file_location('digit_scenes', TOOL)
digit_scenes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digit_scenes)


def make(out, *arguments, num_train=8, num_val=4, image_size=96):
    digit_scenes.main(
        [
            f'--out={out}',
            f'--num-train={num_train}',
            f'--num-val={num_val}',
            f'--image-size={image_size}',
            *map(str, arguments),
        ]
    )
    return str(out)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return make(tmp_path_factory.mktemp('digits') / 'scenes')


def files_of(root):
    return sorted(
        osp.relpath(path, root)
        for path in glob.glob(osp.join(root, '**'), recursive=True)
        if osp.isfile(path)
    )


def annotations_of(root, split):
    path = osp.join(root, 'annotations', f'instances_{split}.json')
    with open(path) as f:
        return json.load(f)


def test_same_arguments_same_bytes(scenes, tmp_path):
    again = make(tmp_path / 'again')
    files = files_of(scenes)
    assert len(files) == 2 * (8 + 4) + 2 + 1
    assert files_of(again) == files
    same, different, failed = filecmp.cmpfiles(
        scenes, again, files, shallow=False
    )
    assert (different, failed) == ([], [])


def test_another_seed_gives_other_images(scenes, tmp_path):
    other = make(tmp_path / 'other', '--seed=1', num_train=1, num_val=1)
    pictures = [f for f in files_of(other) if f.endswith('.png')]
    _, different, _ = filecmp.cmpfiles(scenes, other, pictures, shallow=False)
    assert different == pictures


def test_images_do_not_depend_on_how_many_there_are(scenes, tmp_path):
    fewer = make(tmp_path / 'fewer', num_train=2, num_val=1)
    pictures = [f for f in files_of(fewer) if f.endswith('.png')]
    assert len(pictures) == 6
    same, _, _ = filecmp.cmpfiles(scenes, fewer, pictures, shallow=False)
    assert same == pictures


def test_validation_digits_are_never_trained_on(scenes):
    digits = [
        {a['digit'] for a in annotations_of(scenes, split)['annotations']}
        for split in ('train', 'val')
    ]
    assert all(digits) and not digits[0] & digits[1]
    glyphs = digit_scenes.load_glyphs(seed=5)
    indices = [{i for i, _, _ in glyphs[s]} for s in ('train', 'val')]
    assert not indices[0] & indices[1]
    assert len(indices[0] | indices[1]) == 1797
    assert {label for _, label, _ in glyphs['val']} == set(range(10))


def test_annotations_are_real_digits(scenes):
    from sklearn.datasets import load_digits

    _, labels = load_digits(return_X_y=True)
    for a in annotations_of(scenes, 'train')['annotations']:
        assert a['category_id'] == labels[a['digit']] + 1


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_annotations_agree_with_their_masks(scenes, split):
    coco = COCO(osp.join(scenes, f'annotations/instances_{split}.json'))
    assert [c['name'] for c in coco.cats.values()] == list('0123456789')
    assert len(coco.anns) >= len(coco.imgs)
    for a in coco.anns.values():
        mask = coco.annToMask(a).astype(bool)
        ys, xs = np.nonzero(mask)
        assert a['iscrowd'] == 0
        assert a['area'] == mask.sum() >= digit_scenes.MIN_PIXELS
        assert a['bbox'] == [
            xs.min(),
            ys.min(),
            xs.max() - xs.min() + 1,
            ys.max() - ys.min() + 1,
        ]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_semantic_labels_agree_with_instances(scenes, split):
    """Each pixel belongs to at most one digit: masks are what is visible."""
    coco = COCO(osp.join(scenes, f'annotations/instances_{split}.json'))
    for image in coco.imgs.values():
        path = osp.join(scenes, 'leftImg8bit', split, image['file_name'])
        picture = cv2.imread(path)
        assert picture.shape == (image['height'], image['width'], 3)
        labels = cv2.imread(
            path.replace(
                'leftImg8bit.png', 'gtFine_labelTrainIds.png'
            ).replace(
                f'{os.sep}leftImg8bit{os.sep}', f'{os.sep}gtFine{os.sep}'
            ),
            cv2.IMREAD_UNCHANGED,
        )
        expected = np.zeros_like(labels)
        covered = np.zeros(labels.shape, int)
        for a in coco.imgToAnns[image['id']]:
            mask = coco.annToMask(a).astype(bool)
            expected[mask] = a['category_id']
            covered += mask
        assert covered.max() == 1
        np.testing.assert_array_equal(labels, expected)


def test_a_perfect_prediction_scores_one(scenes):
    from pycocotools.cocoeval import COCOeval

    coco = COCO(osp.join(scenes, 'annotations/instances_val.json'))
    results = coco.loadRes(
        [
            dict(
                image_id=a['image_id'],
                category_id=a['category_id'],
                segmentation=a['segmentation'],
                score=1.0,
            )
            for a in coco.anns.values()
        ]
    )
    evaluation = COCOeval(coco, results, 'segm')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_spread_is_what_it_says(tmp_path):
    between = []
    for spread in (0, 0.5, 1):
        out = make(tmp_path / str(spread), f'--spread={spread}', num_train=40)
        with open(osp.join(out, 'manifest.json')) as f:
            split = json.load(f)['splits']['train']
        pictures = np.stack(
            [
                cv2.imread(osp.join(out, f))[..., ::-1]
                for f in files_of(out)
                if f.startswith('leftImg8bit/train')
            ]
        ).astype(float)
        means = pictures.mean((1, 2))
        np.testing.assert_allclose(split['mean'], means.mean(0), atol=0.01)
        np.testing.assert_allclose(
            split['std_of_means'], means.std(0), atol=0.01
        )
        share = means.var(0) / pictures.var((0, 1, 2))
        assert split['between_images'] == pytest.approx(share.mean(), abs=1e-3)
        between.append(split['between_images'])
    assert between[0] < 0.1 < 0.2 < between[1] < between[2]


def test_nothing_to_do_when_complete(scenes, capsys):
    before = os.stat(osp.join(scenes, 'manifest.json')).st_mtime_ns
    make(scenes)
    assert 'complete already' in capsys.readouterr().out
    assert os.stat(osp.join(scenes, 'manifest.json')).st_mtime_ns == before


def test_other_data_is_never_overwritten(tmp_path):
    (tmp_path / 'photo.jpg').write_text('mine')
    for options in ([], ['--overwrite']):
        with pytest.raises(SystemExit, match='holds no digit scenes'):
            make(tmp_path, *options)
    assert (tmp_path / 'photo.jpg').read_text() == 'mine'


def test_replacing_has_to_be_asked_for(tmp_path):
    out = make(tmp_path / 'scenes', num_train=1, num_val=1)
    with pytest.raises(SystemExit, match=r'seed 0 \(asked for 3\)'):
        make(out, '--seed=3', num_train=1, num_val=1)
    make(out, '--seed=3', '--overwrite', num_train=2, num_val=1)
    assert len(annotations_of(out, 'train')['images']) == 2


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path):
    out = tmp_path / 'scenes'
    unfinished = tmp_path / 'scenes.unfinished'
    process = subprocess.Popen(
        [sys.executable, TOOL, f'--out={out}', '--num-train=100000'],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while len(files_of(unfinished)) < 5:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    make(out, num_train=1, num_val=1)
    assert len(files_of(out)) == 4 + 2 + 1
    assert not unfinished.exists()


def test_what_is_in_the_way_is_left_alone(tmp_path):
    other = tmp_path / 'scenes.unfinished'
    other.mkdir()
    (other / 'thesis.tex').write_text('mine')
    with pytest.raises(SystemExit, match='in the way'):
        make(tmp_path / 'scenes')
    assert (other / 'thesis.tex').read_text() == 'mine'
    shutil.rmtree(other)


@pytest.mark.parametrize(
    'option, message',
    [
        ('--spread=1.5', r'--spread must lie in \[0, 1\], got 1.5'),
        ('--num-train=0', '--num-train must be at least 1, got 0'),
        ('--image-size=8', '--image-size must be at least 64, got 8'),
        ('--seed=-1', '--seed must be at least 0, got -1'),
    ],
)
def test_bad_arguments_are_named(option, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        digit_scenes.main([f'--out={tmp_path / "scenes"}', option])
    assert re.search(message, capsys.readouterr().err)


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='cannot write'):
        make(tmp_path / 'file' / 'scenes')
