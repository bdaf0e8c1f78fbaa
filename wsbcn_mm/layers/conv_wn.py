import math

from mmengine.registry import MODELS
from torch import nn

from ..functional import normalize_weight
from ._base import check_eps
from ._conv_base import ConvBase

# The norm of a filter that keeps the variance through a ReLU.
INITIAL_GAIN = math.sqrt(2)


class _WeightNormalization(ConvBase):
    """Mixin for a convolution that normalizes its weight."""

    centered: bool

    def __init__(
        self, *args, eps: float = 1e-5, device=None, dtype=None, **kwargs
    ):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.eps = check_eps(type(self).__name__, eps)
        self.gain = nn.Parameter(
            self.weight.new_full((self.out_channels,), INITIAL_GAIN)
        )

    def reset_parameters(self) -> None:
        """Draw a weight, and reset the gain."""
        super().reset_parameters()
        if hasattr(self, 'gain'):
            nn.init.constant_(self.gain, INITIAL_GAIN)

    def weight_function(self):
        settings = dict(eps=self.eps, centered=self.centered)
        return normalize_weight, (self.weight, self.gain), settings

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, eps={self.eps}'

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state_dict, prefix: str) -> None:
        """Rewrite another convolution's checkpoint in place."""
        for gain, weight in (  # those of torch's two weight_norm
            ('weight_g', 'weight_v'),
            (
                'parametrizations.weight.original0',
                'parametrizations.weight.original1',
            ),
        ):
            if prefix + gain in state_dict and prefix + weight in state_dict:
                state_dict[f'{prefix}gain'] = state_dict.pop(
                    prefix + gain
                ).flatten()
                state_dict[f'{prefix}weight'] = state_dict.pop(prefix + weight)
        weight = state_dict.get(f'{prefix}weight')
        if weight is not None:  # a plain one keeps the norm of its filters
            rows = weight.flatten(1)
            if self.centered:
                rows = rows - rows.mean(1, keepdim=True)
            state_dict.setdefault(f'{prefix}gain', rows.norm(dim=1))


@MODELS.register_module(name='ConvWN', force=True)
class ConvWN(_WeightNormalization, nn.Conv2d):
    r"""2-D convolution with Weight Normalization.

    .. math::
        y = \hat W * x + b, \qquad
        \hat W_o = g_o \frac{W_o}{\max(\|W_o\|, \epsilon)}

    with the norm over the fan-in of output channel o, in float32 for half
    precision, and a learned gain g, which starts at :math:`\sqrt 2`: with it
    a ReLU keeps the variance. A plain convolution's state dict sets the gain
    to the norm of its filters, so that it computes the same; one of torch's
    ``weight_norm`` is loaded as it is.

    From `Weight Normalization: A Simple Reparameterization to Accelerate
    Training of Deep Neural Networks <https://arxiv.org/abs/1602.07868>`_
    (without its initialization by data, which a normalization that follows
    makes needless).

    Args:
        *args: Positional arguments of :class:`torch.nn.Conv2d`.
        **kwargs: Its keyword arguments.
        eps (float): The smallest norm to divide by. Default: 1e-5

    Attributes:
        gain (Parameter): g, shape (C_out,).

    Shape:
        - Input: :math:`(N, C_{in}, H, W)`
        - Output: :math:`(N, C_{out}, H', W')`

    Raises:
        ValueError: If ``eps`` is negative.

    Example:
        >>> import torch
        >>> conv = ConvWN(64, 128, 3, padding=1, bias=False)
        >>> conv(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 128, 8, 8])
    """

    centered = False
    min_fan_in = 1


@MODELS.register_module(name='ConvCWN', force=True)
class ConvCWN(_WeightNormalization, nn.Conv2d):
    r"""2-D convolution with Centered Weight Normalization.

    .. math::
        y = \hat W * x + b, \qquad
        \hat W_o = g_o \frac{W_o - \mathrm{mean}(W_o)}
            {\max(\|W_o - \mathrm{mean}(W_o)\|, \epsilon)}

    :class:`ConvWN` of centred filters, with the same gain and the same way
    with state dicts, but that a plain convolution's loses its filters' means.
    :class:`ConvWS` is this without a gain, and with the standard deviation
    for the norm: longer by the square root of the fan-in.

    From `Centered Weight Normalization in Accelerating Training of Deep
    Neural Networks <https://openaccess.thecvf.com/content_iccv_2017/html/
    Huang_Centered_Weight_Normalization_ICCV_2017_paper.html>`_.

    Args:
        *args: Positional arguments of :class:`torch.nn.Conv2d`.
        **kwargs: Its keyword arguments.
        eps (float): The smallest norm to divide by. Default: 1e-5

    Attributes:
        gain (Parameter): g, shape (C_out,).

    Shape:
        - Input: :math:`(N, C_{in}, H, W)`
        - Output: :math:`(N, C_{out}, H', W')`

    Raises:
        ValueError: If a filter has a single weight, or ``eps`` is negative.

    Example:
        >>> import torch
        >>> conv = ConvCWN(64, 128, 3, padding=1, bias=False)
        >>> conv(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 128, 8, 8])
    """

    centered = True
