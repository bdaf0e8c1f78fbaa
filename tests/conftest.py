"""What the tests share."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from mmengine.registry import DefaultScope
from processes import Processes

# The same examples every time where a failure would block others; new ones on
# a developer's machine.
settings.register_profile('ci', derandomize=True, deadline=None)
settings.register_profile('default', deadline=None)
settings.load_profile('ci' if os.environ.get('CI') else 'default')


class Vectors:
    """Float64 inputs, outputs and gradients of the authors' released code.

    Args:
        name (str): A file in tests/data, without its suffix.
        case (str): The prefix of its entries.
    """

    def __init__(self, name: str, case: str):
        self._file = np.load(Path(__file__).parent / 'data' / f'{name}.npz')
        self._case = case

    def __contains__(self, key: str) -> bool:
        return f'{self._case}_{key}' in self._file.files

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self._file[f'{self._case}_{key}']))

    def number(self, key: str, default=None):
        return self[key].item() if key in self else default

    def steps(self):
        step = 0
        while f'step{step}_x' in self:
            yield f'step{step}_'
            step += 1


@pytest.fixture
def vectors():
    return Vectors


@pytest.fixture
def messages():
    """What is logged, with the level it is logged at."""
    from mmengine.logging import MMLogger

    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append((record.levelname, record.getMessage()))

    logger = MMLogger.get_current_instance()
    handler = Handler()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture
def mmdet_resnet():
    """mmdet's ResNet. The other tests of layers do without mmdet."""
    return pytest.importorskip('mmdet.models.backbones').ResNet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_scope_left():
    """A Runner's default scope would be the next test's, too."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def processes():
    """Two processes in a gloo group, for all tests that need some."""
    processes = Processes(2)
    yield processes
    processes.close()
