"""The modules, registered in mmengine's root registry."""

from .bcn import BCN
from .bgn import BGN
from .conv_ws import ConvWS, ConvWS1d, ConvWS3d
from .mabn import MABN
from .sync_bcn import SyncBCN

__all__ = [
    'BCN',
    'BGN',
    'MABN',
    'ConvWS',
    'ConvWS1d',
    'ConvWS3d',
    'SyncBCN',
]
