"""What touches mmengine: configs, hooks, checkpoints, compatibility."""

from .config import micro_batch_model
from .durable_files import DurableBackend
from .hooks import (
    CalibrateEstimatesHook,
    ExactResumeHook,
    LossScaleHook,
    NormalizationMonitorHook,
    SkipNonFiniteHook,
    SyncEstimatesHook,
    calibrate,
)
from .update_rate import update_rate

__all__ = [
    'CalibrateEstimatesHook',
    'DurableBackend',
    'ExactResumeHook',
    'LossScaleHook',
    'NormalizationMonitorHook',
    'SkipNonFiniteHook',
    'SyncEstimatesHook',
    'calibrate',
    'micro_batch_model',
    'update_rate',
]
