"""What touches mmengine: configs, hooks, checkpoints, compatibility."""

from .config import micro_batch_model
from .hooks import NormalizationMonitorHook, SyncEstimatesHook
from .update_rate import update_rate

__all__ = [
    'NormalizationMonitorHook',
    'SyncEstimatesHook',
    'micro_batch_model',
    'update_rate',
]
