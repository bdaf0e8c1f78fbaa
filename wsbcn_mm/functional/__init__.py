"""Pure tensor mathematics: no modules, no registry, no state."""

from .coefficients import (
    batch_channel_coefficients,
    batch_statistics,
    group_coefficients,
    large_batch_channel_coefficients,
    updated_estimates,
)
from .engine import moments, normalize
from .weight import standardize_weight

__all__ = [
    'batch_channel_coefficients',
    'batch_statistics',
    'group_coefficients',
    'large_batch_channel_coefficients',
    'moments',
    'normalize',
    'standardize_weight',
    'updated_estimates',
]
