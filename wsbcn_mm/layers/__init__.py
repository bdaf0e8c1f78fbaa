"""The modules, registered in mmengine's root registry."""

from .bcn import BCN
from .conv_ws import ConvWS, ConvWS1d, ConvWS3d

__all__ = ['BCN', 'ConvWS', 'ConvWS1d', 'ConvWS3d']
