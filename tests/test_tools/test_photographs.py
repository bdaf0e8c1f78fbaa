import os.path as osp
import runpy
import sys

import cv2
import numpy as np
import pytest

SCRIPT = osp.join(
    *(osp.dirname(__file__), osp.pardir, osp.pardir),
    *('tools', 'study', 'photographs.py'),
)


@pytest.fixture
def measure(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(
            sys, 'argv', ['photographs.py', *map(str, arguments)]
        )
        runpy.run_path(SCRIPT, run_name='__main__')
        return capsys.readouterr().out

    return call


def test_share_of_the_variance(tmp_path, measure):
    noise = np.random.default_rng(0).normal(0, 20, (2, 300, 300, 3))
    for level, image in zip((108, 148), noise):  # means' variance: 20^2 too
        cv2.imwrite(str(tmp_path / f'{level}.png'), image + level)
    (tmp_path / 'broken.png').write_bytes(b'')
    # Shrinking averages the noise, so what is left of it is less than half.
    out = measure(tmp_path)
    assert 'broken.png cannot be read' in out
    assert '2 images: 0.' in out
    share = float(out.split('2 images: ')[1].split()[0])
    assert 0.5 <= share < 0.8


def test_those_that_come_with_the_environment(measure):
    assert ' images: 0.' in measure()


@pytest.mark.parametrize('images', [None, 0, 1])
def test_errors(tmp_path, measure, images):
    folder = tmp_path / 'images'
    if images is not None:
        folder.mkdir()
        for i in range(images):
            cv2.imwrite(str(folder / f'{i}.png'), np.zeros((4, 4, 3)))
    message = 'no folder' if images is None else 'at least 2 are needed'
    with pytest.raises(SystemExit, match=message):
        measure(folder)
