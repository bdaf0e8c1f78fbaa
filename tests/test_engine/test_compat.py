import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from importlib import metadata

import mmengine
import numpy as np
import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.optim.optimizer import optimizer_wrapper
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version
from torch import nn

from wsbcn_mm.engine import compat
from wsbcn_mm.engine.compat import mmengine_checkpoints, register_configs
from wsbcn_mm.engine.errors import CheckpointError

refusing = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6'),
    reason='MMEngine lets torch refuse nothing before 2.6',
)


def saved(content) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def reloaded(content):
    with mmengine_checkpoints():
        return torch.load(saved(content), weights_only=True)


class Call:
    """Pickles as a call of ``function``, as an attacker's file would."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args, state)

    def __reduce__(self):
        function, args, state = self.parts
        return (function, args) if state is None else self.parts


def test_history_buffer_is_restored():
    buffer = HistoryBuffer([1.0, 5.0], [1, 1])
    again = reloaded({'loss': buffer})['loss']
    assert type(again) is HistoryBuffer
    assert type(again.data[0]) is np.ndarray
    assert again.max_length == buffer.max_length
    assert again.statistics('mean') == 3 and again.statistics('max') == 5
    again.update(9.0)
    assert again.statistics('current') == 9 and again.mean() == 5
    HistoryBuffer().update(1.0)


def test_empty_history_buffer_is_restored():
    again = reloaded(HistoryBuffer())
    again.update(2.0)
    assert again.mean() == 2


@pytest.mark.parametrize(
    'value',
    [
        np.float64(1.5),
        np.int64(-3),
        np.bool_(True),
        np.float32(0.1),
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype='>i4'),
        np.zeros((0, 4), 'f2'),
        np.array(7),
    ],
    ids=repr,
)
def test_numbers_are_restored(value):
    again = reloaded(value)
    assert isinstance(again, type(value))
    assert again.dtype == value.dtype.newbyteorder('=')
    assert again.shape == value.shape
    np.testing.assert_array_equal(again, value)


def test_restored_arrays_do_not_tie_checkpoints_to_this_package():
    again = reloaded({'a': np.arange(3), 'b': HistoryBuffer([1.0], [1])})
    assert type(np.append(again['a'], 1)) is np.ndarray
    with zipfile.ZipFile(saved(again)) as archive:
        name = next(n for n in archive.namelist() if n.endswith('data.pkl'))
        names = [
            argument
            for operation, argument, _ in pickletools.genops(
                archive.read(name)
            )
            if operation.name == 'GLOBAL'
        ]
    assert not [n for n in names if 'wsbcn_mm' in n or 'compat' in n]


@pytest.mark.parametrize(
    'attack',
    [
        Call(os.system, 'exit 3'),
        Call(eval, '1 + 1'),
        Call(getattr, HistoryBuffer, '__init__'),
        Call(getattr, HistoryBuffer, '__subclasses__'),
        Call(getattr, HistoryBuffer.mean, '__globals__'),
        Call(getattr, np.ndarray, 'tofile'),
        np.array([Call(os.system, 'exit 3')], dtype=object),
        np.array([None], dtype=object),
        np.array(['text']),
    ],
    ids=[
        'system',
        'eval',
        'getattr init',
        'getattr subclasses',
        'getattr globals',
        'getattr tofile',
        'array of calls',
        'array of objects',
        'array of text',
    ],
)
def test_code_is_refused(attack):
    with pytest.raises(pickle.UnpicklingError):
        reloaded({'state_dict': {}, 'message_hub': attack})


@refusing
def test_loading_with_mmengine_runs_nothing(tmp_path):
    """The maintained fork would load again, without torch's safety."""
    path, witness = str(tmp_path / 'bad.pth'), tmp_path / 'witness'
    attack = Call(os.system, f'touch {witness}')
    torch.save({'state_dict': {}, 'meta': attack}, path)
    with pytest.raises(CheckpointError, match='posix.system.*could run code'):
        load_checkpoint(torch.nn.Linear(1, 1), path)
    assert not witness.exists()
    torch.save({'state_dict': {}, 'meta': HistoryBuffer([1.0], [1])}, path)
    loaded = load_checkpoint(torch.nn.Linear(1, 1), path)
    assert loaded['meta'].current() == 1


def test_bytes_do_not_become_pointers():
    """What NumPy's own unpickling does with these crashes the process."""
    state = (3, '|', None, None, None, -1, -1, 0)  # objects not declared
    dtype = Call(np.dtype, 'O8', False, True, state=state)
    reconstruct = np.arange(1).__reduce__()[0]
    array = Call(
        reconstruct,
        np.ndarray,
        (0,),
        b'b',
        state=(1, (1,), dtype, False, b'A' * 8),
    )
    with pytest.raises(pickle.UnpicklingError, match='numbers'):
        reloaded(array)


@pytest.mark.parametrize('shape', [(2**40,), (-1,), (3,)])
def test_array_of_another_size_than_its_bytes_is_refused(shape):
    reconstruct = np.arange(1).__reduce__()[0]
    state = (1, shape, np.dtype('i8'), False, b'A' * 8)
    with pytest.raises(pickle.UnpicklingError, match='bytes'):
        reloaded(Call(reconstruct, np.ndarray, (0,), b'b', state=state))


def test_history_buffer_cannot_replace_the_methods_of_others():
    state = dict(
        _log_history=np.ones(1),
        _count_history=np.ones(1),
        max_length=3,
        statistics_methods={'mean': torch.Size},
        mean=torch.Size,
    )
    buffer = Call(HistoryBuffer, state=state)
    reloaded(buffer)
    assert HistoryBuffer([4.0], [1]).statistics('mean') == 4


def test_stock_mmengine_checkpoint_needs_the_compatibility():
    """Else this module could go."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved(HistoryBuffer([1.0], [1])), weights_only=True)


@pytest.fixture
def declared_by_others():
    """The workaround that issue threads give for these checkpoints."""
    before = torch.serialization.get_safe_globals()
    multiarray = sys.modules[np.arange(1).__reduce__()[0].__module__]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            getattr,
            np.dtype,
            np.ndarray,
            multiarray._reconstruct,
            multiarray.scalar,
            type(np.dtype('f8')),
            type(np.dtype('i8')),
            (np.dtype, 'name.of.others'),
        ]
    )
    yield set(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@refusing
def test_what_others_declare_safe_does_not_mix(declared_by_others, tmp_path):
    """Of two under one name torch takes any: here it is the stand-in."""
    content = dict(a=np.arange(2), b=HistoryBuffer([1.0], [1]), c=np.int64(3))
    assert reloaded(content)['b'].current() == 1
    with pytest.raises(pickle.UnpicklingError):
        reloaded(Call(getattr, np.ndarray, 'tofile'))
    path = str(tmp_path / 'x.pth')
    torch.save(content, path)
    assert CheckpointLoader.load_checkpoint(path)['b'].current() == 1


@refusing
def test_other_loads_are_left_alone(declared_by_others):
    for error in (None, KeyError):
        try:
            with mmengine_checkpoints():
                if error:
                    raise error
        except KeyError:
            pass
        left = torch.serialization.get_safe_globals()
        assert set(left) == declared_by_others
    again = torch.load(saved(np.arange(2)), weights_only=True)
    assert type(again) is np.ndarray


def test_one_door_and_nothing_for_the_whole_process():
    code = (
        'import torch, wsbcn_mm; '
        'declared = torch.serialization.get_safe_globals(); '
        'assert "wsbcn_mm" not in str(declared), declared; '
        'assert "mmengine" not in str(declared), declared'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    door = CheckpointLoader.load_checkpoint
    compat.allow_mmengine_checkpoints()
    assert CheckpointLoader.load_checkpoint == door


@pytest.mark.parametrize('norm', ['BN', 'BCN', 'SyncBCN'])
def test_accumulation_warns_of_batch_normalization_only(norm, monkeypatch):
    told = []
    monkeypatch.setattr(
        optimizer_wrapper, 'print_log', lambda m, **_: told.append(m)
    )
    norm = build_norm_layer(dict(type=norm), 64)[1]
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Sequential(norm))
    wrapper = optimizer_wrapper.OptimWrapper(
        torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2
    )
    wrapper.initialize_count_status(model, 0, 4)
    told = [message for message in told if 'BatchNorm' in message]
    assert len(told) == (type(norm) is nn.BatchNorm2d)


def base_config(tmp_path, base: str) -> Config:
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {base!r}\n')
    return Config.fromfile(path)


def test_configs_resolve_by_package_name(tmp_path):
    """With or without an entry in a metafile."""
    cfg = base_config(
        tmp_path,
        'wsbcn_mm::digits/mask-rcnn_r18-slim_fpn_bcn-ws_1xb1-5e_digits.py',
    )
    assert cfg.model.type == 'MaskRCNN'


def test_missing_config_names_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match='no_such_config'):
        base_config(tmp_path, 'wsbcn_mm::digits/no_such_config.py')


def test_configs_resolve_in_the_fork(tmp_path, monkeypatch):
    """Its distribution is not called mmsegmentation, as MMEngine expects."""
    find_version = metadata.version

    def version(name):
        if name == 'mmsegmentation':
            raise metadata.PackageNotFoundError(name)
        return find_version(name)

    monkeypatch.setattr(metadata, 'version', version)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    for function in ('is_installed', 'get_installed_path'):
        real = getattr(mmengine.config.config, function)

        def without_mmsegmentation(name, real=real):
            return real('no_such_package' if 'segment' in name else name)

        monkeypatch.setattr(
            mmengine.config.config, function, without_mmsegmentation
        )
    base = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    with pytest.raises(ModuleNotFoundError, match='mmsegmentation'):
        base_config(tmp_path, base)
    register_configs()
    assert base_config(tmp_path, base).model.type == 'EncoderDecoder'
    assert MODULE2PACKAGE['wsbcn_mm'] == 'wsbcn_mm.version'
