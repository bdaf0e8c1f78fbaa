import mmcv.cnn  # noqa: F401  registers its ConvWS, which ours replaces
from mmengine.registry import MODELS
from torch import nn

from ..functional import standardize_weight
from ._base import check_eps
from ._conv_base import ConvBase


class _WeightStandardization(ConvBase):
    """Mixin for a convolution that standardizes its weight."""

    def __init__(
        self, *args, eps: float = 1e-5, device=None, dtype=None, **kwargs
    ):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.eps = check_eps(type(self).__name__, eps)

    def weight_function(self):
        return standardize_weight, (self.weight,), dict(eps=self.eps)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, eps={self.eps}'


@MODELS.register_module(name='ConvWS', force=True)
class ConvWS(_WeightStandardization, nn.Conv2d):
    r"""2-D convolution with Weight Standardization.

    .. math::
        y = \hat W * x + b, \qquad
        \hat W_o = \frac{W_o - \mathrm{mean}(W_o)}
                        {\mathrm{std}(W_o) + \epsilon}

    with the unbiased standard deviation over the fan-in of output channel o,
    in float32 for half precision. The same numbers as mmcv's ``ConvWS``,
    which it replaces in the registry. Follow it with a normalization: its
    output has no scale of its own.

    From `Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization <https://arxiv.org/abs/1903.10520>`_.

    Args:
        *args: Positional arguments of :class:`torch.nn.Conv2d`.
        **kwargs: Its keyword arguments.
        eps (float): Added to the standard deviation. Default: 1e-5

    Shape:
        - Input: :math:`(N, C_{in}, H, W)`
        - Output: :math:`(N, C_{out}, H', W')`

    Raises:
        ValueError: If a filter has a single weight, or ``eps`` is negative.

    Example:
        >>> import torch
        >>> conv = ConvWS(64, 128, 3, padding=1, bias=False)
        >>> conv(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 128, 8, 8])
    """


@MODELS.register_module(name='ConvWS1d', force=True)
class ConvWS1d(_WeightStandardization, nn.Conv1d):
    """1-D convolution with Weight Standardization: see :class:`ConvWS`."""


@MODELS.register_module(name='ConvWS3d', force=True)
class ConvWS3d(_WeightStandardization, nn.Conv3d):
    """3-D convolution with Weight Standardization: see :class:`ConvWS`."""
