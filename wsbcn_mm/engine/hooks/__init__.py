"""What our layers want done during training."""

from .sync_estimates_hook import SyncEstimatesHook

__all__ = ['SyncEstimatesHook']
