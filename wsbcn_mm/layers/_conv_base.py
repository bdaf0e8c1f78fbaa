"""What convolutions with a function of their weight share."""

from torch import Tensor


class ConvBase:
    """Mixin for a convolution that is done with a function of its weight.

    Attributes:
        min_fan_in (int): How many weights the smallest filter has that the
            function leaves anything of.
    """

    min_fan_in = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < self.min_fan_in:
            raise ValueError(
                f'{type(self).__name__}: nothing would be left of a filter '
                f'of one weight; got in_channels={self.in_channels}, '
                f'groups={self.groups}, kernel_size={self.kernel_size}. Use '
                'a plain convolution here.'
            )

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution is done with."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized_weight(), self.bias)
