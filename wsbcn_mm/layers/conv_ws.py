import mmcv.cnn  # noqa: F401  registers its ConvWS, which ours replaces
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import standardize_weight
from ._base import check_eps


class _WeightStandardization:
    """Mixin for a convolution that standardizes its weight."""

    def __init__(self, *args, eps: float = 1e-5, **kwargs):
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        self.eps = check_eps(name, eps)
        fan_in = self.weight[0].numel()
        if fan_in < 2:
            raise ValueError(
                f'{name}: a filter of one weight has no standard deviation; '
                f'got in_channels={self.in_channels}, groups={self.groups}, '
                f'kernel_size={self.kernel_size}. Use a plain convolution '
                'here.'
            )

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution is done with."""
        return standardize_weight(self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized_weight(), self.bias)

    def register_parameter(self, name: str, param) -> None:
        # fuse_conv_bn gives the convolution a bias, and a scale that
        # standardization would take out again: wrong outputs.
        if (
            name == 'bias'
            and param is not None
            and 'bias' in self._parameters
            and self.bias is None
        ):
            raise RuntimeError(
                f'{type(self).__name__}: a normalization is being fused into '
                'the raw weight of this convolution, which standardizes its '
                'weight: the outputs would be wrong. Load the model again and '
                'use wsbcn_mm.fold_for_inference(model) instead.'
            )
        super().register_parameter(name, param)

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
        *args, **kwargs: Those of :class:`torch.nn.Conv2d`.
        eps (float): Added to the standard deviation. Default: 1e-5

    Shape:
        - Input: :math:`(N, C_{in}, H, W)`
        - Output: :math:`(N, C_{out}, H', W')`

    Raises:
        ValueError: If a filter has a single weight, or ``eps`` is negative.

    Example:
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
