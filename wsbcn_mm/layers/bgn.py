import math
from functools import partial
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import (
    batch_group_coefficients,
    group_statistics,
    moments,
    normalize,
)
from ..functional.kernels import statistics_dtype
from ._base import NormBase, check_count, check_momentum
from .batch import batch_of
from .running_statistics import RunningStatistics


@MODELS.register_module(name='BGN', force=True)
class BGN(RunningStatistics, NormBase):
    r"""Batch Group Normalization.

    A sample's C * H * W values are split, in that order, into G runs of the
    same length, and each run is normalized over the batch:

    .. math::
        y = \gamma_c \frac{x - \mu_g}{\sqrt{\sigma^2_g + \epsilon}} + \beta_c

    with the mean and the biased variance of run g over all samples in
    training, and running averages of them (of the unbiased variance) in
    evaluation, as in :class:`torch.nn.BatchNorm2d`, which it is for G = C.
    A small batch wants fewer and longer runs, a large one more: where G
    divides C, a run is a group of channels; with more runs than channels, or
    any other number, a run is of parts of them.

    From `Batch Group Normalization <https://arxiv.org/abs/2012.02782>`_.

    Args:
        num_features (int): Number of channels C.
        num_groups (int): Number of runs G, which must divide C * H * W.
        eps (float): Added to the variance. Default: 1e-5
        momentum (float | None): The update rate of the running averages.
            None: the cumulative average of all batches. Default: 0.1

    Attributes:
        weight, bias (Parameter): :math:`\gamma, \beta`, shape (C,).
        running_mean, running_var (Tensor): Running averages, shape (G,).
        num_batches_tracked (Tensor): Number of training forwards.

    Shape:
        - Input: :math:`(N, C, *)`, 3 to 5 dimensions; float64, float32,
          bfloat16 or float16 (statistics in float32)
        - Output: the same shape, dtype and memory format

    Raises:
        ValueError: If an argument is out of range, if the input has another
            number of channels or of dimensions, if ``num_groups`` does not
            divide the values of a sample, or in training if a run has a
            single value over the whole batch.
        TypeError: If an argument or the input is of another type.

    .. note::
        Where G does not divide C, the run that a value belongs to depends on
        the size of the image, and so do running averages. Such a G is for
        inputs of one size.

    Example:
        >>> norm = BGN(64, num_groups=16)
        >>> norm(torch.randn(2, 64, 50, 76)).shape
        torch.Size([2, 64, 50, 76])
    """

    _abbr_ = 'bgn'
    checkpoint_abbrs = ('bgn', 'bn', 'norm')

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        device=None,
        dtype=None,
    ):
        name = type(self).__name__
        super().__init__(num_features, eps, check_momentum(name, momentum))
        self.num_groups = check_count(name, 'num_groups', num_groups)
        factory = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(self.num_features, **factory))
        self.bias = nn.Parameter(torch.empty(self.num_features, **factory))
        self._register_estimates(self.num_groups, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget everything: unit scale, zero shift, no averages."""
        if self.num_batches_tracked is None:
            return  # BatchNorm2d's constructor, which has nothing to reset
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    @property
    def _splits_channels(self) -> bool:
        return self.num_features % self.num_groups != 0

    def inference_affine(self) -> Tuple[Tensor, Tensor]:
        """``scale`` and ``shift`` of each channel: what evaluation computes.

        Returns:
            tuple[Tensor]: ``y = x * scale + shift``, shape (C,) each.

        Raises:
            ValueError: If runs split channels, which have no affine then.
        """
        if self._splits_channels:
            raise ValueError(
                f'BGN({self.num_features}, num_groups={self.num_groups}): '
                'runs that split channels have no affine per channel; '
                'num_groups would have to divide num_features'
            )
        per_group = self.num_features // self.num_groups
        mean, var = (
            t.repeat_interleave(per_group)
            for t in (self.running_mean, self.running_var)
        )
        scale = self.weight * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        dtype = statistics_dtype(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not self._splits_channels:
            return self._normalize(x, weight, bias)
        values = math.prod(x.shape[1:])
        if values % self.num_groups:
            raise ValueError(
                f'BGN: num_groups={self.num_groups} must divide the '
                f'{" * ".join(map(str, x.shape[1:]))} = {values} values of '
                f'a sample of an input of shape {tuple(x.shape)}'
            )
        runs = x.reshape(len(x), self.num_groups, values // self.num_groups)
        one = weight.new_ones(self.num_groups)
        y = self._normalize(runs, one, torch.zeros_like(one)).view(x.shape)
        shape = (-1, *(1 for _ in x.shape[2:]))
        y = torch.addcmul(bias.view(shape), y, weight.view(shape))
        return torch.empty_like(x).copy_(y)

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalize with runs that are groups of the channels of ``x``."""
        per_group = x.shape[1] // self.num_groups
        if self.training:
            mean, var = moments(x)
            batch = batch_of(self, x, mean, var)
            if batch:
                advice = 'Use fewer groups, or several samples.'
                self.check_batch(batch, x, per_group, 'run', advice)
                if self.is_learning:
                    self._update(batch, mean, var, per_group)
                return normalize(
                    x,
                    mean,
                    var,
                    partial(
                        batch_group_coefficients,
                        num_groups=self.num_groups,
                        eps=self.eps,
                        statistics=batch.statistics,
                    ),
                    weight,
                    bias,
                )
        mean, var = (
            t.to(weight.dtype).repeat_interleave(per_group)
            for t in (self.running_mean, self.running_var)
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)

    @torch.no_grad()
    def _update(self, batch, mean: Tensor, var: Tensor, per_group: int):
        """Move the running averages towards a batch's statistics."""
        self.widen_statistics()
        mean, var = group_statistics(
            *batch.statistics(mean, var), num_groups=self.num_groups
        )
        self._move_estimates(
            mean, var * batch.bessel(per_group), batch.is_filled
        )

    def extra_repr(self) -> str:
        return (
            f'{self.num_features}, num_groups={self.num_groups}, '
            f'eps={self.eps}, momentum={self.momentum}'
        )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state_dict, prefix: str) -> None:
        """Rewrite a Batch Normalization's checkpoint in place.

        The statistics of a group follow from those of its channels, and the
        affine takes what is left, so that evaluation computes the same.
        """
        names = ('running_mean', 'running_var', 'weight', 'bias')
        found = [state_dict.get(prefix + name) for name in names]
        if (
            self._splits_channels
            or self.num_groups == self.num_features
            or any(t is None or len(t) != self.num_features for t in found)
        ):
            return
        mean, var, weight, bias = found
        group_mean, group_var = group_statistics(
            mean, var, num_groups=self.num_groups
        )
        per_group = self.num_features // self.num_groups
        scale = weight / (var + self.eps).sqrt()
        new = (
            group_mean,
            group_var,
            scale * (group_var + self.eps).sqrt().repeat_interleave(per_group),
            bias + scale * (group_mean.repeat_interleave(per_group) - mean),
        )
        state_dict.update({prefix + k: v for k, v in zip(names, new)})
