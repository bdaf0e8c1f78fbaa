"""Networks that the MM libraries lack. Needs MMPretrain."""

from .resnet_cifar import CIFARResNet

__all__ = ['CIFARResNet']
