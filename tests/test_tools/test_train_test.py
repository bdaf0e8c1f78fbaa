"""Train, test and resume, through our tools and the libraries' own."""

import importlib.util
import json
import os
import os.path as osp
import re
import subprocess
import sys
from importlib import metadata

import pytest
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

import wsbcn_mm  # noqa: F401

ROOT = osp.abspath(osp.join(osp.dirname(__file__), '../..'))
DETECTION = 'mask-rcnn_r18-slim_fpn_bcn-ws_1xb1-5e_digits.py'
SEGMENTATION = 'deeplabv3plus_r18-slim_bcn-ws_1xb1-4k_digits-160x160.py'

pytestmark = pytest.mark.slow


def tools_of(library: str) -> str:
    if library == 'wsbcn_mm':
        return osp.join(ROOT, 'tools')
    spec = importlib.util.find_spec(library)
    return osp.join(osp.dirname(spec.origin), '.mim', 'tools')


def run(*command, **environment):
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'scenes'
    run(
        sys.executable,
        osp.join(ROOT, 'tools/dataset_converters/digit_scenes.py'),
        f'--out={out}',
        '--num-train=3',
        '--num-val=2',
        '--image-size=64',
    )
    return out


@pytest.fixture
def config(tmp_path, scenes):
    """A user's config: one of ours, with few and small images."""

    def write(name: str) -> str:
        path = tmp_path / 'tiny.py'
        lines = [f'_base_ = {osp.join(ROOT, "configs/digits", name)!r}']
        for loader in ('train', 'val', 'test'):
            lines.append(
                f'{loader}_dataloader = dict(dataset=dict('
                f'data_root={str(scenes) + "/"!r}))'
            )
        if name == DETECTION:
            lines += [
                f'{part}_evaluator = dict(ann_file='
                f'{str(scenes / "annotations/instances_val.json")!r})'
                for part in ('val', 'test')
            ]
            lines.append('train_cfg = dict(max_epochs=1, val_interval=1)')
        else:
            lines.append('train_cfg = dict(max_iters=3, val_interval=3)')
            lines.append(
                'default_hooks = dict(logger=dict(interval=1),'
                ' checkpoint=dict(interval=3))'
            )
        path.write_text('\n'.join(lines))
        return str(path)

    return write


def test_train_resume_and_test(config, tmp_path):
    path = config(DETECTION)
    work_dir = tmp_path / 'work'
    train = [sys.executable, f'{tools_of("wsbcn_mm")}/train.py', path,
             '--work-dir', work_dir]  # fmt: skip
    output = run(*train)
    first = work_dir / 'epoch_1.pth'
    assert first.exists() and 'segm_mAP_50' in output
    output = run(*train, '--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    assert re.search(r'resumed epoch: 1, iter: 3', output)
    assert not re.search(r'Epoch\(train\) +\[1\]', output)
    second = work_dir / 'epoch_2.pth'
    saved = CheckpointLoader.load_checkpoint(str(second))
    assert (saved['meta']['epoch'], saved['meta']['iter']) == (2, 6)
    history = saved['message_hub']['log_scalars']['train/loss']
    assert len(history.data[0]) == 6  # from before the interruption as well
    norm = saved['state_dict']['backbone.bcn1.num_batches_tracked']
    assert norm == 6
    output = run(
        sys.executable,
        f'{tools_of("wsbcn_mm")}/test.py',
        path,
        second,
        f'--work-dir={tmp_path / "test"}',
        f'--out={tmp_path / "predictions.pkl"}',
        '--show-dir=pictures',
        '--cfg-options',
        f'test_evaluator.outfile_prefix={tmp_path / "results"}',
    )
    assert (tmp_path / 'predictions.pkl').exists()
    [metrics] = tmp_path.glob('test/*/*.json')
    assert 'coco/segm_mAP_50' in json.loads(metrics.read_text())
    assert len(list(tmp_path.glob('test/*/pictures/*.png'))) == 2


def readable(path: str) -> str:
    """A config that mmseg's own tools read in the maintained fork too.

    There ``mmseg::`` is found only once this package is imported.
    """
    try:
        metadata.version('mmsegmentation')
    except metadata.PackageNotFoundError:
        Config.fromfile(path).dump(path)
    return path


def test_the_libraries_own_tools(config, tmp_path):
    for library, name, checkpoint, metric in (
        ('mmdet', DETECTION, 'epoch_1.pth', 'segm_mAP'),
        ('mmseg', SEGMENTATION, 'iter_3.pth', 'mIoU'),
    ):
        path = readable(config(name))
        work_dir = tmp_path / library
        tools = tools_of(library)
        run(sys.executable, f'{tools}/train.py', path, '--work-dir', work_dir)
        output = run(
            sys.executable,
            f'{tools}/test.py',
            path,
            work_dir / checkpoint,
            '--work-dir',
            work_dir / 'test',
        )
        assert metric in output


def test_segmentation_through_our_tools_on_two_processes(config, tmp_path):
    work_dir = tmp_path / 'work'
    output = run(
        'bash',
        f'{tools_of("wsbcn_mm")}/dist_train.sh',
        config(SEGMENTATION),
        2,
        f'--work-dir={work_dir}',
        PYTHON=sys.executable,
        PORT='29631',
        CUDA_VISIBLE_DEVICES='',
    )
    assert 'mIoU' in output
    assert len(list(work_dir.glob('iter_3.pth'))) == 1
