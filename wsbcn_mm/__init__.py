"""Batch-Channel Normalization and Weight Standardization for OpenMMLab."""

from ._requirements import check_requirements
from .version import __version__

check_requirements()

from . import functional  # noqa: E402
from .layers import BCN, ConvWS, ConvWS1d, ConvWS3d  # noqa: E402

__all__ = [
    'BCN',
    'ConvWS',
    'ConvWS1d',
    'ConvWS3d',
    '__version__',
    'functional',
]
