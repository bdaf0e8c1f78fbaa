"""Networks that the MM libraries lack, for those that are installed."""

from importlib.util import find_spec

__all__ = []

if find_spec('mmpretrain') is not None:
    from .resnet_cifar import CIFARResNet  # noqa: F401

    __all__.append('CIFARResNet')
if find_spec('mmseg') is not None:
    from .pointwise_aspp_head import PointwiseASPPHead  # noqa: F401

    __all__.append('PointwiseASPPHead')
