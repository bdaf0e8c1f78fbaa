"""Batch-Channel Normalization and Weight Standardization for OpenMMLab."""

from ._requirements import check_requirements
from .version import __version__

check_requirements()

from . import functional  # noqa: E402
from .convert import convert_to_micro_batch  # noqa: E402
from .converted_model import converted_model as _converted_model  # noqa: E402, F401
from .deploy import fold_for_inference  # noqa: E402
from .engine import (  # noqa: E402
    SyncEstimatesHook,
    micro_batch_model,
    update_rate,
)
from .engine import compat as _compat  # noqa: E402, F401
from .layers import (  # noqa: E402
    BCN,
    BGN,
    MABN,
    CenConv,
    ConvCWN,
    ConvWN,
    ConvWS,
    ConvWS1d,
    ConvWS3d,
    SyncBCN,
    set_loss_scale,
)

__all__ = [
    'BCN',
    'BGN',
    'CenConv',
    'ConvCWN',
    'ConvWN',
    'ConvWS',
    'ConvWS1d',
    'ConvWS3d',
    'MABN',
    'SyncBCN',
    'SyncEstimatesHook',
    '__version__',
    'convert_to_micro_batch',
    'fold_for_inference',
    'functional',
    'micro_batch_model',
    'set_loss_scale',
    'update_rate',
]
