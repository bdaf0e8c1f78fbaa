"""Pure tensor mathematics: no modules, no registry, no state."""

from .batch_channel import (
    BatchChannelCoefficients,
    LargeBatchChannelCoefficients,
    learn_and_normalize,
)
from .coefficients import (
    batch_channel_coefficients,
    batch_group_coefficients,
    batch_statistics,
    group_coefficients,
    group_statistics,
    large_batch_channel_coefficients,
    moments_from_statistics,
)
from .engine import moments, moved_estimates, normalize, wants_graph
from .estimates import rate_of_forward, updated_estimates
from .mabn import moving_average_coefficients
from .shared_weight import SharedWeight
from .transforms import is_transformed, snapshot
from .weight import standardize_weight
from .weight_normalization import centralize_weight, normalize_weight

__all__ = [
    'BatchChannelCoefficients',
    'LargeBatchChannelCoefficients',
    'SharedWeight',
    'batch_channel_coefficients',
    'batch_group_coefficients',
    'batch_statistics',
    'centralize_weight',
    'group_coefficients',
    'group_statistics',
    'is_transformed',
    'large_batch_channel_coefficients',
    'learn_and_normalize',
    'moments',
    'moments_from_statistics',
    'moved_estimates',
    'moving_average_coefficients',
    'normalize',
    'normalize_weight',
    'rate_of_forward',
    'snapshot',
    'standardize_weight',
    'updated_estimates',
    'wants_graph',
]
