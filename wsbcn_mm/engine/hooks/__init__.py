"""What our layers want done during training."""

from .calibrate import CalibrateEstimatesHook, calibrate
from .exact_resume import ExactResumeHook
from .loss_scale_hook import LossScaleHook
from .normalization_monitor import (
    NormalizationMonitor,
    NormalizationMonitorHook,
)
from .skip_non_finite import SkipNonFiniteHook
from .sync_estimates_hook import SyncEstimatesHook

__all__ = [
    'CalibrateEstimatesHook',
    'ExactResumeHook',
    'LossScaleHook',
    'NormalizationMonitor',
    'NormalizationMonitorHook',
    'SkipNonFiniteHook',
    'SyncEstimatesHook',
    'calibrate',
]
