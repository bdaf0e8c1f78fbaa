"""The modules, registered in mmengine's root registry."""

from . import replacement  # noqa: F401  hooks into the registration of modules
from .bcn import BCN
from .bgn import BGN
from .cen_conv import CenConv
from .conv_wn import ConvCWN, ConvWN
from .conv_ws import ConvWS, ConvWS1d, ConvWS3d
from .gradient_averaging import set_loss_scale
from .mabn import MABN
from .sync_bcn import SyncBCN

__all__ = [
    'BCN',
    'BGN',
    'MABN',
    'CenConv',
    'ConvCWN',
    'ConvWN',
    'ConvWS',
    'ConvWS1d',
    'ConvWS3d',
    'SyncBCN',
    'set_loss_scale',
]
