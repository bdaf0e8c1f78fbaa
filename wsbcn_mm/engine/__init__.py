"""What touches mmengine: configs, hooks, checkpoints, compatibility."""

from .config import micro_batch_model
from .hooks import (
    CalibrateEstimatesHook,
    ExactResumeHook,
    LossScaleHook,
    NormalizationMonitorHook,
    SyncEstimatesHook,
    calibrate,
)
from .update_rate import update_rate

__all__ = [
    'CalibrateEstimatesHook',
    'ExactResumeHook',
    'LossScaleHook',
    'NormalizationMonitorHook',
    'SyncEstimatesHook',
    'calibrate',
    'micro_batch_model',
    'update_rate',
]
