"""Pure tensor mathematics: no modules, no registry, no state."""

from .batch_channel import (
    AveragedGradientCoefficients,
    BatchChannelCoefficients,
    LargeBatchChannelCoefficients,
    learn_and_normalize,
    micro_batch_coefficients,
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
from .gradient_statistics import (
    Average,
    exponential_share,
    fitted,
    is_in_window,
    join_statistics,
    pool_statistics,
    subtract_fit,
)
from .mabn import moving_average_coefficients
from .shared_weight import SharedWeight
from .transforms import is_functorch, is_transformed, snapshot
from .weight import standardize_weight
from .weight_normalization import centralize_weight, normalize_weight

__all__ = [
    'Average',
    'AveragedGradientCoefficients',
    'BatchChannelCoefficients',
    'LargeBatchChannelCoefficients',
    'SharedWeight',
    'batch_channel_coefficients',
    'batch_group_coefficients',
    'batch_statistics',
    'centralize_weight',
    'exponential_share',
    'fitted',
    'group_coefficients',
    'group_statistics',
    'is_functorch',
    'is_in_window',
    'is_transformed',
    'join_statistics',
    'large_batch_channel_coefficients',
    'learn_and_normalize',
    'micro_batch_coefficients',
    'moments',
    'moments_from_statistics',
    'moved_estimates',
    'moving_average_coefficients',
    'normalize',
    'normalize_weight',
    'pool_statistics',
    'rate_of_forward',
    'snapshot',
    'standardize_weight',
    'subtract_fit',
    'updated_estimates',
    'wants_graph',
]
