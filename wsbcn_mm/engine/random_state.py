"""The random number generators of a process, all of them."""

import contextlib
import random

import numpy as np
import torch


@contextlib.contextmanager
def preserved_random_state():
    """Draw random numbers without anyone noticing afterwards.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with preserved_random_state():
        ...     _ = torch.rand(1)
        >>> torch.rand(1)
        tensor([0.4963])
    """
    states = random.getstate(), np.random.get_state()
    # By itself fork_rng takes the GPUs of other processes too, and says so.
    gpu = torch.cuda.is_available()
    with torch.random.fork_rng([torch.cuda.current_device()] if gpu else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_all(*keys: int) -> None:
    """Seed all generators with a hash of some non-negative integers."""
    first, second = np.random.SeedSequence(keys).generate_state(2)
    random.seed(int(first))
    np.random.seed(second)
    torch.manual_seed(int(first) << 32 | int(second))
