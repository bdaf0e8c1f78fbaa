from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import ASPPHead
from mmseg.registry import MODELS


@MODELS.register_module()
class PointwiseASPPHead(ASPPHead):
    """DeepLabV3's head, with a 1x1 convolution after the pyramid.

    As in `Rethinking Atrous Convolution for Semantic Image Segmentation
    <https://arxiv.org/abs/1706.05587>`_ and in the code that BCN + WS was
    published with; MMSegmentation's :class:`ASPPHead` has a 3x3 convolution
    there. With Weight Standardization neither is a case of the other.

    Args:
        **kwargs: Those of ``ASPPHead``.

    Example:
        >>> import torch
        >>> head = PointwiseASPPHead(in_channels=8, channels=4, num_classes=3)
        >>> head([torch.randn(2, 8, 5, 5)]).shape
        torch.Size([2, 3, 5, 5])
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bottleneck = ConvModule(
            (len(self.dilations) + 1) * self.channels,
            self.channels,
            1,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )
