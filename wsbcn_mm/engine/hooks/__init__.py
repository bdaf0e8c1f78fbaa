"""What our layers want done during training."""

from .normalization_monitor import (
    NormalizationMonitor,
    NormalizationMonitorHook,
)
from .sync_estimates_hook import SyncEstimatesHook

__all__ = [
    'NormalizationMonitor',
    'NormalizationMonitorHook',
    'SyncEstimatesHook',
]
