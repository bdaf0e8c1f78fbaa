"""What is said of a config that cannot be built, and of files."""

import errno

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope

import wsbcn_mm  # noqa: F401
from wsbcn_mm.engine.errors import UsageError
from wsbcn_mm.engine.mistakes import about_a_file, mistakes_explained


def build(registry=MODELS, **cfg):
    cfg = Config(dict(model=cfg))
    init_default_scope('mmengine')
    with mistakes_explained(cfg):
        return registry.build(cfg.model)


@pytest.mark.parametrize(
    'cfg, message',
    [
        (dict(type='BCNorm'), "model is of no known type 'BCNorm'.*'BCN'"),
        (
            dict(type='BCN', num_features=4, num_group=2),
            r"model \(BCN\) has no argument 'num_group'.*'num_groups'",
        ),
        (
            dict(type='BCN', num_features=4, num_groups=0),
            'BCN > BCN: num_groups must be a positive integer, got 0',
        ),
    ],
    ids=['type', 'argument', 'value'],
)
def test_mistakes_are_named_with_their_place(cfg, message):
    with pytest.raises(UsageError, match=message) as error:
        build(**cfg)
    assert error.value.__cause__ is not None
    assert len(str(error.value).splitlines()) == 1


def test_other_registries():
    message = "'SyncEstimateHook'.*'SyncEstimatesHook'"
    with pytest.raises(UsageError, match=message):
        build(HOOKS, type='SyncEstimateHook')


def test_other_errors_keep_their_traceback(monkeypatch):
    with pytest.raises(KeyError), mistakes_explained(Config(dict(a=1))):
        raise KeyError('of a training step')
    monkeypatch.setenv('WSBCN_MM_TRACEBACK', '1')
    with pytest.raises(KeyError):
        build(type='BCNorm')


def test_files():
    full = OSError(errno.ENOSPC, 'No space left on device', 'a.pth')
    assert "no space for 'a.pth'" in about_a_file(full)
    missing = FileNotFoundError(errno.ENOENT, 'No such file', 'a.png')
    assert about_a_file(missing) == "'a.png': No such file."
    worker = FileNotFoundError(
        'Caught FileNotFoundError in DataLoader worker process 0.\n'
        'Original Traceback (most recent call last):\n  File "x"\n'
        "FileNotFoundError: [Errno 2] No such file or directory: 'a.png'\n"
    )
    assert about_a_file(worker).startswith("no file 'a.png'. Put it there")
    broken = AssertionError('failed to load image: a.png')
    assert "'a.png' is no image" in about_a_file(broken)
    assert about_a_file(AssertionError('something else')) is None
    assert about_a_file(ConnectionResetError('by peer')) is None
