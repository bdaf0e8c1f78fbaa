import argparse
import os
import pickle
import urllib.error

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader

from wsbcn_mm.engine.checkpoint_errors import check_crc, explained
from wsbcn_mm.engine.errors import CheckpointError


def message(source: str, error: Exception) -> str:
    with pytest.raises(CheckpointError) as told, explained(source):
        raise error
    assert len(str(told.value).splitlines()) == 1
    return str(told.value)


@pytest.mark.parametrize(
    'name, url',
    [
        ('torchvision://resnet50', 'download.pytorch.org/models/resnet50'),
        ('open-mmlab://jhu/resnet50_gn_ws', 'resnet50_gn_ws-15beedd8.pth'),
        ('https://host/a.pth?x=1', 'https://host/a.pth'),
    ],
)
def test_without_network(name, url, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    text = message(name, urllib.error.URLError('no route to host'))
    assert name in text and url in text and 'no route to host' in text
    place = tmp_path / 'hub' / 'checkpoints'
    assert f'put it at {place}{os.sep}' in text and '?' not in text[-200:]
    assert 'pretrained=False' in text


def test_misspelled_names():
    text = message('torchvision://resnet51', KeyError('resnet51'))
    assert 'torchvision://resnet51' in text and 'resnet50' in text


def test_what_says_more_by_itself_is_left_alone():
    for error in (
        torch.cuda.OutOfMemoryError('CUDA out of memory'),
        RuntimeError('Attempting to deserialize object on a CUDA device'),
        PermissionError(13, 'Permission denied', 'x.pth'),
        FileNotFoundError('x.pth can not be found.'),
    ):
        with pytest.raises(type(error)) as raised, explained('x.pth'):
            raise error
        assert raised.value is error


def test_through_mmengine(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(dict(args=argparse.Namespace()), path)
    with pytest.raises(CheckpointError, match='x.pth.*argparse.Namespace'):
        with explained(str(path)):
            torch.load(path, weights_only=True)
    path.write_bytes(pickle.dumps([])[:3])
    with pytest.raises(CheckpointError, match='damaged or truncated'):
        CheckpointLoader.load_checkpoint(str(path))


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / 'x.pth'
    weight = torch.arange(100.0)
    torch.save(weight, path)
    check_crc(str(path))
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 8] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # sees nothing
    with pytest.raises(CheckpointError, match='x.pth.*checksum'):
        check_crc(str(path))


def test_files_without_checksums(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    check_crc(str(path))
    if hasattr(torch.serialization, 'set_crc32_options'):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(torch.ones(3), path)
        finally:
            torch.serialization.set_crc32_options(True)
        check_crc(str(path))
