import mmcv.cnn  # noqa: F401  registers its ConvWS, which ours replaces
from mmengine.registry import MODELS
from torch import nn

from ..functional import standardize_weight
from ._base import check_eps
from ._conv_base import ConvBase


class _WeightStandardization(ConvBase):
    """Mixin for a convolution that standardizes its weight."""

    def __init__(
        self,
        *args,
        eps: float = 1e-5,
        eps_inside_sqrt: bool = False,
        device=None,
        dtype=None,
        **kwargs,
    ):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        name = type(self).__name__
        self.eps = check_eps(name, eps)
        if not isinstance(eps_inside_sqrt, bool):
            raise TypeError(
                f'{name}: eps_inside_sqrt must be True or False, got '
                f'{eps_inside_sqrt!r}'
            )
        self.eps_inside_sqrt = eps_inside_sqrt

    def weight_function(self):
        settings = dict(eps=self.eps, eps_inside_sqrt=self.eps_inside_sqrt)
        return standardize_weight, (self.weight,), settings

    def extra_repr(self) -> str:
        form = ', eps_inside_sqrt=True' if self.eps_inside_sqrt else ''
        return f'{super().extra_repr()}, eps={self.eps}{form}'


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

    The authors released two forms. That above is the one of `their object
    detector <https://github.com/joe-siyuan-qiao/maskrcnn-benchmark>`_, of
    `GN+WS classifiers
    <https://github.com/joe-siyuan-qiao/pytorch-classification>`_ and of
    DeepLabV3. Their `BCN+WS classifiers
    <https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization/blob/
    master/imagenet/models/layers.py>`_ divide by
    :math:`\sqrt{\mathrm{var}(W_o) + \epsilon}`, which is
    ``eps_inside_sqrt=True``. A weight trained with one form has another scale
    in the other: 5 % where the standard deviation of a filter is 0.01.

    From `Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization <https://arxiv.org/abs/1903.10520>`_.

    Args:
        *args: Positional arguments of :class:`torch.nn.Conv2d`.
        **kwargs: Its keyword arguments.
        eps (float): Added to the standard deviation. Default: 1e-5
        eps_inside_sqrt (bool): Whether to add ``eps`` to the variance
            instead, inside the square root. Default: False

    Shape:
        - Input: :math:`(N, C_{in}, H, W)`
        - Output: :math:`(N, C_{out}, H', W')`

    Raises:
        ValueError: If a filter has a single weight, or ``eps`` is negative.
        TypeError: If ``eps_inside_sqrt`` is no bool.

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
