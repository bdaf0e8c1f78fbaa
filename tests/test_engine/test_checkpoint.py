from collections import OrderedDict

import pytest
import torch
from mmengine.logging import HistoryBuffer

from wsbcn_mm.engine.checkpoint import (
    publish,
    read_checkpoint,
    read_config,
    select,
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
