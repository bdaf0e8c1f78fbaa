import os
from collections import OrderedDict

import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from wsbcn_mm.engine.checkpoint import (
    check_resumable,
    check_same_network,
    load_all_weights,
    newest_checkpoint,
    publish,
    read_checkpoint,
    read_config,
    select,
    share_of_weights,
    strip,
)
from wsbcn_mm.engine.errors import CheckpointError, UsageError


def state(prefix):
    result = OrderedDict(
        {f'{prefix}a.weight': torch.ones(1), f'{prefix}b': torch.zeros(1)}
    )
    result._metadata = OrderedDict(
        {'': 0, prefix.rstrip('.'): 1, f'{prefix}a': 2}
    )
    return result


def test_select_keeps_the_metadata():
    part = select(state('backbone.'), 'backbone.')
    assert list(part) == ['a.weight', 'b']
    assert dict(part._metadata) == {'': 1, 'a': 2}


def test_strip_only_where_all_have_it():
    assert list(strip(state('module.'), 'module.')) == ['a.weight', 'b']
    mixed = {**state('module.'), 'c': torch.zeros(1)}
    assert strip(mixed, 'module.') is mixed


@pytest.mark.parametrize('key', ['state_dict', 'model', None])
def test_the_usual_containers(tmp_path, key):
    path = str(tmp_path / 'x.pth')
    torch.save(state('module.') if key is None else {key: state('')}, path)
    checkpoint = read_checkpoint(path)
    assert list(checkpoint['state_dict']) == ['a.weight', 'b']
    assert checkpoint['meta'] == {}


@pytest.mark.parametrize('text', ['Not found', 'hello\n', ''])
def test_a_text_file_is_no_checkpoint(tmp_path, text):
    path = tmp_path / 'x.pth'
    path.write_text(text)
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_checkpoint(str(path))


def test_checkpoints_of_mmengine(tmp_path):
    path = str(tmp_path / 'x.pth')
    hub = dict(log_scalars={'loss': HistoryBuffer([1.0], [1])})
    torch.save(dict(state_dict=state(''), message_hub=hub), path)
    hub = read_checkpoint(path)['message_hub']
    assert hub['log_scalars']['loss'].current() == 1


def test_publish_leaves_no_half_written_file(tmp_path):
    with pytest.raises(Exception, match='pickle'):
        publish({'state_dict': {'a': lambda: 0}}, str(tmp_path / 'x.pth'))
    assert not list(tmp_path.iterdir())


def test_configs(tmp_path):
    with pytest.raises(UsageError, match='no config'):
        read_config(str(tmp_path / 'none.py'))
    path = tmp_path / 'x.py'
    path.write_text('a = 1')
    with pytest.raises(UsageError, match='has no model'):
        read_config(str(path))


def training_checkpoint(path, epoch):
    torch.save(
        dict(state_dict=state(''), meta=dict(epoch=epoch, iter=9),
             message_hub={}), path
    )  # fmt: skip
    os.utime(path, (epoch, epoch))


def test_the_newest_checkpoint_that_is_whole(tmp_path):
    work_dir = str(tmp_path)
    assert newest_checkpoint(work_dir) is None
    for epoch in (1, 2, 10):
        training_checkpoint(tmp_path / f'epoch_{epoch}.pth', epoch)
    (tmp_path / 'best_mAP_epoch_10.pth').write_text('has no optimizer')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_10.pth'))
    assert newest_checkpoint(work_dir).endswith('epoch_10.pth')
    content = (tmp_path / 'epoch_10.pth').read_bytes()
    (tmp_path / 'epoch_10.pth').write_bytes(content[:99])
    assert newest_checkpoint(work_dir).endswith('epoch_2.pth')
    (tmp_path / 'last_checkpoint').write_text('')
    (tmp_path / 'epoch_10.pth').unlink()
    assert newest_checkpoint(work_dir).endswith('epoch_2.pth')
    for path in tmp_path.glob('epoch_*'):
        path.write_bytes(b'')
    with pytest.raises(CheckpointError, match='(?s)finds no .*epoch_1.pth'):
        newest_checkpoint(work_dir)


def test_what_last_checkpoint_says_goes_first(tmp_path):
    for epoch in (1, 2):
        training_checkpoint(tmp_path / f'epoch_{epoch}.pth', epoch)
    for name in (str(tmp_path / 'epoch_1.pth'), 's3://bucket/epoch_1.pth'):
        (tmp_path / 'last_checkpoint').write_text(name)
        assert newest_checkpoint(str(tmp_path)) == name


def test_weights_alone_cannot_be_resumed():
    with pytest.raises(CheckpointError, match='epoch.*load_from=x.pth'):
        check_resumable(dict(state_dict=state('')), 'x.pth')


def test_another_network_is_told_by_names_and_shapes():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    weights = module.state_dict()
    assert share_of_weights(module, weights) == 1
    check_same_network(module, weights, 'x')
    load_all_weights(module, weights, 'x', strict=True)
    for other in (
        {'conv.weight': weights['0.weight']},
        {'0.weight': torch.zeros(3, 1, 3, 3)},
        {},
    ):
        assert share_of_weights(module, other) == 0
        with pytest.raises(CheckpointError, match='x is of another network'):
            check_same_network(module, other, 'x')
    partly = dict(weights, **{'1.weight': torch.ones(3)})
    with pytest.raises(CheckpointError, match='size mismatch for 1.weight'):
        load_all_weights(module, partly, 'x', strict=False)
