import math
import warnings
from typing import Optional, Tuple, Union

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import (
    LargeBatchChannelCoefficients,
    learn_and_normalize,
    micro_batch_coefficients,
    moments,
    normalize,
)
from ._base import (
    NormBase,
    check_count,
    check_momentum,
    largest_divisor,
)
from .batch import Batch, batch_of, shared_group
from .checkpoint_layouts import translate_to_bcn
from .gradient_averaging import GradientAveraging, check_grad_averaging
from .running_statistics import RunningStatistics


@MODELS.register_module(name='BCN', force=True)
class BCN(GradientAveraging, RunningStatistics, NormBase):
    r"""Batch-Channel Normalization, for batches of any size down to one image.

    A channel is normalized first with batch statistics, then, together with
    the channels of its group, with the sample's own:

    .. math::
        z_{ncl} &= \gamma^b_c \frac{x_{ncl} - \mu_c}
                   {\sqrt{\sigma^2_c + \epsilon}} + \beta^b_c \\
        y_{ncl} &= \gamma_g \frac{z_{ncl} - \mathrm{mean}_{ng}(z)}
                   {\sqrt{\mathrm{var}_{ng}(z) + \epsilon}} + \beta_g

    With ``estimate=True`` (micro-batch), :math:`\mu_c` and :math:`\sigma^2_c`
    are estimates that each training forward moves by a share r, the update
    rate, towards the batch's, and they carry no gradient. With
    ``estimate=False`` (large batch) they are the batch's own mean and
    variance in training, and running averages in evaluation, as in
    :class:`torch.nn.BatchNorm2d`.

    With ``grad_averaging`` the gradient through estimates is Batch
    Normalization's, over the images that the layer saw lately. With g the
    gradient that constant estimates would give,

    .. math::
        \frac{\partial L}{\partial x} = g - \alpha - \beta x, \qquad
        \beta = \frac{\mathrm{cov}(g, x)}{\mathrm{var}(x) + \epsilon},
        \qquad \alpha = \mathrm{mean}(g) - \beta\, \mathrm{mean}(x)

    where mean, variance and covariance of a channel are over the last images
    and the present ones. So the gradient has no part along a shift or a
    scaling of the channel in these images, however far behind the estimates
    are. With the images of a batch, and estimates equal to its statistics,
    it is the gradient of ``estimate=False``.

    From `Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization <https://arxiv.org/abs/1903.10520>`_. Use it with
    :class:`ConvWS`. Not to be confused with the layer of the same name in
    `arXiv:2312.00596 <https://arxiv.org/abs/2312.00596>`_.

    Args:
        num_features (int): Number of channels C.
        num_groups (int): Number of channel groups. Where it does not divide
            C, the largest divisor of C not above it is taken. With one
            channel a group, of which the constructor warns, the second step
            is instance normalization. Default: 32
        eps (float): Added to both variances. Default: 1e-5
        momentum (float | str | None): The update rate r, applied once a
            training forward. A memory of about ``images / r`` images follows
            from it, and it is what should stay fixed: ``r = 0.01 * images per
            forward / max(images per optimizer step, 16)`` is a good choice
            (:func:`update_rate`), annealed. None: the cumulative average of
            all forwards. Default: ``'auto'``, 0.001 (that of 1 or 2 images
            of 16), and 0.1 with ``estimate=False``, as in
            :class:`torch.nn.BatchNorm2d`
        estimate (bool): Whether to normalize with estimates (micro-batch)
            rather than with the batch's own statistics. Default: True
        channel_affine (str): ``'group'`` for one pair :math:`\gamma,
            \beta` per group, ``'channel'`` for one per channel, which is what
            a Group Normalization checkpoint holds. A group's pair takes the
            gradients of all its channels: where groups are large and so is
            SGD's learning rate, it can turn a layer off. Default: ``'group'``
        momentum_annealing (bool): Whether the rate of the t-th training
            forward is ``max(r, 1 / (1 + t))``, as in mmengine's
            ``MomentumAnnealingEMA``: the estimates begin as averages, and
            forget at once that they began at mean 0 and variance 1, which the
            rate r does in 1 / r forwards. ``micro_batch_model`` and
            ``convert_to_micro_batch`` choose it along with the rate. Loaded
            estimates go on where they were. Default: False
        grad_averaging (int | float | None): Which images the gradient through
            the estimates is over, in training mode with ``estimate=True``. An
            int K: the last K. A float q between 0 and 1: all of them,
            averaged exponentially at the rate q of an image. Default: None,
            for estimates that are constants

    Attributes:
        weight, bias (Parameter): :math:`\gamma, \beta`, the output affine.
        batch_weight, batch_bias (Parameter): :math:`\gamma^b, \beta^b`.
        running_mean, running_var (Tensor): :math:`\mu, \sigma^2`.
        num_batches_tracked (Tensor): Number of training forwards.
        grad_statistics (Tensor): What ``grad_averaging`` remembers: mean and
            variance of x, mean of g and covariance, of the last calls, shape
            (K - 1, 4, C), or of all, shape (1, 4, C).
        grad_images (Tensor): How many images had come after each call.
        loss_scale (float | Tensor | None): See :func:`set_loss_scale`.

    Shape:
        - Input: :math:`(N, C, *)`, 3 to 5 dimensions; float64, float32,
          bfloat16 or float16 (statistics in float32)
        - Output: the same shape, dtype and memory format

    Raises:
        ValueError: If an argument is out of range, if the input has another
            number of channels or of dimensions, or in training with
            ``estimate=False`` if a channel has a single value over the batch.
        TypeError: If an argument or the input is of another type.
        RuntimeError: With ``grad_averaging``, for a gradient of a gradient
            or a ``torch.func`` transform in training mode.

    .. note::
        ``grad_averaging`` takes calls in the order of their backward passes,
        and every call counts the same, of however many images. A call with an
        infinite or NaN gradient leaves nothing behind, nor does one without
        images or without a backward pass. The forward of activation
        checkpointing that is done again is no call of its own.

    Example:
        >>> norm = BCN(64, momentum=0.01 / 16, momentum_annealing=True)
        >>> norm(torch.randn(1, 64, 50, 76)).shape
        torch.Size([1, 64, 50, 76])
    """

    _abbr_ = 'bcn'

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: Union[float, str, None] = 'auto',
        estimate: bool = True,
        channel_affine: str = 'group',
        momentum_annealing: bool = False,
        grad_averaging: Union[int, float, None] = None,
        device=None,
        dtype=None,
    ):
        name = type(self).__name__
        num_features = check_count(name, 'num_features', num_features)
        num_groups = check_count(name, 'num_groups', num_groups)
        if channel_affine not in ('group', 'channel'):
            raise ValueError(
                f"{name}: channel_affine must be 'group' or "
                f"'channel', got {channel_affine!r}"
            )
        for argument, value in (
            ('estimate', estimate),
            ('momentum_annealing', momentum_annealing),
        ):
            if not isinstance(value, bool):
                raise TypeError(
                    f'{name}: {argument} must be True or False, got '
                    f'{value!r} ({type(value).__name__})'
                )
        if momentum == 'auto':
            momentum = 0.001 if estimate else 0.1
        super().__init__(num_features, eps, check_momentum(name, momentum))
        self.num_groups = largest_divisor(num_features, num_groups)
        if self.num_groups == num_features > 1:
            warnings.warn(
                f'{name}({num_features}, num_groups={num_groups}) has one '
                'channel a group: that is instance normalization, by which a '
                'map of one position becomes constant. For larger groups '
                f"write norm_cfg=dict(type='{name}', num_groups="
                f'{num_features // 2}).',
                stacklevel=2,
            )
        self.estimate = estimate
        self.channel_affine = channel_affine
        self.momentum_annealing = momentum_annealing
        pairs = self.num_groups if channel_affine == 'group' else num_features
        factory = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(pairs, **factory))
        self.bias = nn.Parameter(torch.empty(pairs, **factory))
        self.batch_weight = nn.Parameter(torch.empty(num_features, **factory))
        self.batch_bias = nn.Parameter(torch.empty(num_features, **factory))
        self._register_estimates(num_features, **factory)
        grad_averaging = check_grad_averaging(name, grad_averaging)
        if grad_averaging is not None and not estimate:
            raise ValueError(
                f'{name}: grad_averaging={grad_averaging} is for '
                'estimate=True; with estimate=False the gradient is that of '
                "the batch's own statistics"
            )
        self._register_grad_statistics(grad_averaging, num_features, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget everything: unit scales, zero shifts, no estimates."""
        if self.num_batches_tracked is None:
            return  # BatchNorm2d's constructor, which has nothing to reset
        for weight in (self.weight, self.batch_weight):
            nn.init.ones_(weight)
        for bias in (self.bias, self.batch_bias):
            nn.init.zeros_(bias)
        self.reset_running_stats()

    def check_new_momentum(self, momentum: Optional[float]) -> None:
        if momentum == 1 and self.estimate:
            raise RuntimeError(
                f'{type(self).__name__}: momentum is being set to 1, as '
                'PreciseBNHook does, by which an image would be normalized '
                'with its own statistics alone. To measure the estimates anew '
                'use CalibrateEstimatesHook, or momentum=None, the average of '
                'all forwards.'
            )

    def _affines(self) -> Tuple[Tensor, ...]:
        """Both affines; what is frozen of the output's is so of the batch's.

        Tools that freeze a Batch Normalization know ``weight`` and ``bias``.
        """
        weight, bias = self.weight, self.bias
        batch_weight, batch_bias = self.batch_weight, self.batch_bias
        if not weight.requires_grad and batch_weight.requires_grad:
            batch_weight = batch_weight.detach()
        if not bias.requires_grad and batch_bias.requires_grad:
            batch_bias = batch_bias.detach()
        return batch_weight, batch_bias, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        settings = dict(num_groups=self.num_groups, eps=self.eps)
        parameters = self._affines()
        learning = self.is_learning
        if learning:
            self.widen_statistics()
        of_batch = self.training and not self.estimate
        if of_batch and not self.is_synchronized:
            advice = 'Use several samples, or estimate=True.'
            self.check_batch(Batch(x), x, 1, 'channel', advice)
        if learning and shared_group(self) is None:
            y = learn_and_normalize(
                x,
                *parameters,
                average=self._grad_average(x, Batch(x)),
                running_mean=self.running_mean,
                running_var=self.running_var,
                estimate=self.estimate,
                **self._rate(),
                **settings,
            )
            if y is not None:
                return y
        mean, var = moments(x)
        batch = coefficients = estimates = None
        if learning or of_batch or self.is_fitting:
            batch = batch_of(self, x, mean, var)
        if batch and learning:
            estimates = self._update(batch, mean, var)
        if batch and of_batch:
            coefficients = LargeBatchChannelCoefficients(
                statistics=batch.statistics, **settings
            )
        if coefficients is None:
            coefficients = micro_batch_coefficients(
                *(estimates or self._estimates(mean.dtype)),
                average=self._grad_average(x, batch),
                length=max(math.prod(x.shape[2:]), 1),
                **settings,
            )
        return normalize(x, mean, var, coefficients, *parameters)

    @torch.no_grad()
    def _update(
        self, batch: Batch, mean: Tensor, var: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Move the estimates towards a batch's moments."""
        if self.estimate and isinstance(batch, Batch):
            return self._learn_moments(mean, var)
        if self.estimate:  # squares about the old mean, as the authors do
            old_mean = self.running_mean.to(mean.dtype)
            new_mean, new_var = batch.statistics(mean, var, old_mean)
        else:  # the unbiased variance, as torch does
            new_mean, new_var = batch.statistics(mean, var)
            new_var = new_var * batch.bessel()
        return self._move_estimates(new_mean, new_var, batch.is_filled)

    def extra_repr(self) -> str:
        return (
            f'{self.num_features}, num_groups={self.num_groups}, '
            f'eps={self.eps}, momentum={self.momentum}, '
            f'estimate={self.estimate}, '
            f'channel_affine={self.channel_affine!r}, '
            f'momentum_annealing={self.momentum_annealing}'
            + (
                f', grad_averaging={self.grad_averaging}'
                if self.grad_averaging is not None
                else ''
            )
        )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        translate_to_bcn(self, state_dict, prefix)
        self._fit_grad_statistics(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._trust_estimates()
