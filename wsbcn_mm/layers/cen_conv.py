from mmengine.registry import MODELS
from torch import nn

from ..functional import centralize_weight
from ._conv_base import ConvBase


@MODELS.register_module(name='CenConv', force=True)
class CenConv(ConvBase, nn.Conv2d):
    r"""2-D convolution with centralized weight.

    .. math::
        y = \hat W * x + b, \qquad \hat W_o = W_o - \mathrm{mean}(W_o)

    over the fan-in of output channel o, in float32 for half precision. The
    convolution to use before :class:`MABN`, which does without the mean of
    its input: a filter of mean zero is blind to a shift that is common to
    all that it sees.

    From `Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization <https://arxiv.org/abs/2001.06838>`_; it loads the
    state dict of its authors' layer, as that of a plain convolution.

    Args:
        *args: Positional arguments of :class:`torch.nn.Conv2d`.
        **kwargs: Its keyword arguments.

    Shape:
        - Input: :math:`(N, C_{in}, H, W)`
        - Output: :math:`(N, C_{out}, H', W')`

    Raises:
        ValueError: If a filter has a single weight.

    Example:
        >>> import torch
        >>> conv = CenConv(64, 128, 3, padding=1, bias=False)
        >>> conv(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 128, 8, 8])
    """

    def weight_function(self):
        return centralize_weight, (self.weight,), {}
