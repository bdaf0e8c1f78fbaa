import random

import numpy as np
import torch

from wsbcn_mm.engine.random_state import preserved_random_state


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_nobody_notices():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with preserved_random_state():
        draw()
    assert draw() == expected


def test_other_gpus_are_left_alone(monkeypatch):
    """torch warns where it is not told which of several to take."""
    taken = []
    fork_rng = torch.random.fork_rng

    def record(devices):
        taken.append(devices)
        return fork_rng([])

    monkeypatch.setattr(torch.random, 'fork_rng', record)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
        with preserved_random_state():
            pass
    assert taken == [[], [3]]
