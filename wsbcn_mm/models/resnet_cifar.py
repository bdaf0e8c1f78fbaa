from mmpretrain.models import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.registry import MODELS


@MODELS.register_module()
class CIFARResNet(ResNet_CIFAR):
    """The thin ResNet of the CIFAR experiments: 20 to 110 layers.

    Three stages of 16, 32 and 64 channels on maps of 32, 16 and 8 pixels a
    side, each of ``(depth - 2) / 6`` basic blocks, after `Deep Residual
    Learning for Image Recognition <https://arxiv.org/abs/1512.03385>`_,
    section 4.2. MMPretrain's own :class:`ResNet_CIFAR` is the four-stage
    network for ImageNet with another stem. The shortcuts that change the
    number of channels are 1x1 convolutions here, not the paper's padding.

    Args:
        depth (int): Number of layers: 20, 32, 44, 56 or 110.
        **kwargs: Those of ``ResNet_CIFAR``.

    Example:
        >>> import torch
        >>> net = CIFARResNet(20)
        >>> net(torch.randn(1, 3, 32, 32))[0].shape
        torch.Size([1, 64, 8, 8])
    """

    arch_settings = {
        depth: (BasicBlock, ((depth - 2) // 6,) * 3)
        for depth in (20, 32, 44, 56, 110)
    }

    def __init__(self, depth: int, **kwargs):
        defaults = dict(
            stem_channels=16,
            base_channels=16,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2,),
        )
        super().__init__(depth, **{**defaults, **kwargs})
