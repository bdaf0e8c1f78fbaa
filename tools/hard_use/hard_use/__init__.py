"""Attacks on the package, each a function that takes a bench."""

from . import (  # noqa: F401  they put themselves into the list
    checkpoints,
    configs,
    data,
    interruptions,
    numerics,
    processes,
)
from .bench import ATTACKS, Bench, make_scenes

__all__ = ['ATTACKS', 'Bench', 'make_scenes']
