from functools import partial
from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import moments, moving_average_coefficients, normalize
from ..functional.kernels import statistics_dtype
from ._base import NormBase, check_count, check_momentum, in_backward
from .batch import batch_of
from .gradient_averaging import RemembersGradients, store

# As in the authors' code, the ratio r stays within this factor.
RATIO_LIMIT = 5.0
# Training forwards of a layer that may be done again.
REMEMBERED_CALLS = 8
# How far a forward that is done again may be off in its mean squares: more
# than rounding is, in half precision too, and less than another batch is.
RECALL_TOLERANCE = 0.05


class _Call(NamedTuple):
    """What one training forward normalized with."""

    batch_square: Tensor
    mean_square: Tensor
    ratio: Tensor
    slot: Tensor
    averaging: Tensor


@MODELS.register_module(name='MABN', force=True)
class MABN(RemembersGradients, NormBase):
    r"""Moving Average Batch Normalization, for small batches.

    It stabilizes all that Batch Normalization takes from a batch by a moving
    average, in the backward pass too. It does without the mean: use it with
    :class:`CenConv`, whose centred weights stand in for it.

    .. math::
        y = \gamma r \frac{x}{\sqrt{\chi^2 + \epsilon}} + \beta, \qquad
        r = \mathrm{clip}_{[1/5, 5]}
            \sqrt{\frac{\chi^2 + \epsilon}{\hat\chi^2 + \epsilon}}

    :math:`\chi^2` is the mean square of a channel over the last
    ``simulated_batch_size / batch_size`` batches, and :math:`\hat\chi^2`,
    ``running_var``, an exponential moving average of that; evaluation
    normalizes by the latter. In the gradient

    .. math::
        \frac{\partial L}{\partial x} = \frac{g - \psi z}
            {\sqrt{\chi^2 + \epsilon}}, \qquad
        g = \gamma r \frac{\partial L}{\partial y}, \quad
        z = \frac{x}{\sqrt{\chi^2 + \epsilon}}

    :math:`\psi`, the mean of :math:`g z`, is averaged over the last batches
    as well, and r is a constant. The first iterations, up to
    ``warmup_iters`` and until the buffers are full, take both from the batch
    alone; up to ``ratio_warmup_iters`` (or ``warmup_iters``) r is 1.

    From `Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization <https://arxiv.org/abs/2001.06838>`_, as in its
    authors' released code, whose state dict it loads. A Batch Normalization's
    is loaded so that evaluation computes the same.

    Args:
        num_features (int): Number of channels C.
        batch_size (int): Samples of a batch.
        simulated_batch_size (int): Samples to average over, a multiple of
            ``batch_size``. Default: 32
        eps (float): Added to mean squares. Default: 1e-5
        momentum (float): What the exponential average keeps at each step:
            1 minus the update rate, unlike elsewhere. Default: 0.98
        warmup_iters (int): Training forwards before moving averages are
            used. Default: 100
        ratio_warmup_iters (int): Training forwards before the ratio r is
            used, 1000 in the authors' detection and 100 in their
            classification. Default: 1000

    Attributes:
        weight, bias (Parameter): :math:`\gamma, \beta`.
        running_var (Tensor): :math:`\hat\chi^2`, shape (C,).
        buffer_x2, buffer_gz (Tensor): Mean squares and :math:`\psi` of the
            last batches, shape (simulated_batch_size / batch_size, C).
        num_batches_tracked (Tensor): Number of training forwards.

    Shape:
        - Input: :math:`(N, C, *)`, 3 to 5 dimensions; float64, float32,
          bfloat16 or float16 (statistics in float32)
        - Output: the same shape, dtype and memory format

    Raises:
        ValueError: If an argument is out of range, or the input has another
            number of channels or of dimensions.
        TypeError: If an argument or the input is of another type.

    .. note::
        ``batch_size`` only says how many batches to average over: each one
        counts the same, of whatever size it is, as at the end of an epoch or
        in a head that sees proposals. An empty one does not count.

    .. note::
        ``buffer_gz`` holds gradients of the loss. Where dynamic loss scaling
        (float16) changes their scale, say so: :func:`set_loss_scale`. A batch
        with an infinite or NaN statistic leaves none.

    Example:
        >>> norm = MABN(64, batch_size=2, simulated_batch_size=16)
        >>> norm(torch.randn(2, 64, 50, 76)).shape
        torch.Size([2, 64, 50, 76])
    """

    _abbr_ = 'mabn'
    statistics = ('running_var', 'buffer_x2', 'buffer_gz')
    checkpoint_abbrs = ('mabn', 'bn', 'norm')

    def __init__(
        self,
        num_features: int,
        batch_size: int,
        simulated_batch_size: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.98,
        warmup_iters: int = 100,
        ratio_warmup_iters: int = 1000,
        device=None,
        dtype=None,
    ):
        name = type(self).__name__
        momentum = check_momentum(name, momentum, optional=False)
        super().__init__(num_features, eps, momentum)
        self.batch_size = check_count(name, 'batch_size', batch_size)
        self.simulated_batch_size = check_count(
            name, 'simulated_batch_size', simulated_batch_size
        )
        if self.simulated_batch_size % self.batch_size:
            raise ValueError(
                f'{name}: simulated_batch_size must be a multiple of '
                f'batch_size, got {simulated_batch_size} and {batch_size}'
            )
        # 0 is allowed: no warm-up but that of the buffers.
        self.warmup_iters, self.ratio_warmup_iters = (
            0 if iters == 0 else check_count(name, argument, iters)
            for argument, iters in (
                ('warmup_iters', warmup_iters),
                ('ratio_warmup_iters', ratio_warmup_iters),
            )
        )
        factory = dict(device=device, dtype=dtype)
        size = self.simulated_batch_size // self.batch_size
        self.weight = nn.Parameter(torch.empty(self.num_features, **factory))
        self.bias = nn.Parameter(torch.empty(self.num_features, **factory))
        # It has none, but tools for Batch Normalization look at it.
        mean = torch.zeros(num_features, device=device)
        self.register_buffer('running_mean', mean, persistent=False)
        self._register_statistic('running_var', num_features, **factory)
        for buffer in ('buffer_x2', 'buffer_gz'):
            self._register_statistic(buffer, size, num_features, **factory)
        self.register_buffer(
            'num_batches_tracked', torch.tensor(0, device=device)
        )
        # For activation checkpointing, which does some of them again.
        self._calls = []  # no deque: torch 2.6 cannot compile one
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget all moving averages."""
        self.running_var.fill_(1)
        self.buffer_x2.zero_()
        self.buffer_gz.zero_()
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Forget everything: unit scale, zero shift, no averages."""
        if self.num_batches_tracked is None:
            return  # BatchNorm2d's constructor, which has nothing to reset
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def inference_affine(self) -> Tuple[Tensor, Tensor]:
        """``scale`` and ``shift`` of each channel: what evaluation computes.

        Returns:
            tuple[Tensor]: ``y = x * scale + shift``, shape (C,) each.
        """
        return self.weight * (self.running_var + self.eps).rsqrt(), self.bias

    def check_new_momentum(self, momentum: float) -> None:
        if momentum is None or not 0 < momentum < 1:
            raise RuntimeError(
                f'{type(self).__name__}: momentum is being set to {momentum}, '
                'as to a Batch Normalization, but here it is what the moving '
                'average keeps, 1 minus the update rate. To stop the average '
                'call eval() on the layer, or set track_running_stats=False.'
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if self.training and self.track_running_stats:
            mean, var = moments(x)
            batch = batch_of(self, x, mean, var)
            if batch:
                return self._normalize(x, mean, var, batch)
        dtype = statistics_dtype(x.dtype)
        running_var, weight, bias = (
            t.to(dtype) for t in (self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(
            x,
            torch.zeros_like(running_var),
            running_var.clone(),  # of which autograd keeps no copy
            weight,
            bias,
            eps=self.eps,
        )

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor, batch):
        with torch.no_grad():
            batch_mean, batch_var = batch.statistics(mean, var)
            batch_square = batch_var + batch_mean.square()
            if in_backward():
                call = self._recall(batch_square)
            else:
                call = self._advance(batch_square, batch.is_filled)

        def average(psi_sum: Tensor) -> Tensor:
            psi = batch.sum(psi_sum) / batch.num_positions
            with torch.no_grad():
                good = psi.isfinite() & (batch.is_filled > 0)
                store(self.buffer_gz, call.slot, self.unscaled(psi), good)
                buffered = self.buffer_gz.mean(0, dtype=psi.dtype)
                buffered = self.scaled(buffered)
            return torch.where(call.averaging, buffered, psi)

        return normalize(
            x,
            mean,
            var,
            partial(
                moving_average_coefficients,
                length=x[0, 0].numel() if x.numel() else 0,
                mean_square=call.mean_square,
                ratio=call.ratio,
                eps=self.eps,
                average=average,
            ),
            self.weight,
            self.bias,
        )

    def _advance(self, batch_square: Tensor, is_filled) -> _Call:
        """Take in a batch's mean square, for what to normalize with."""
        dtype = batch_square.dtype
        self.widen_statistics()
        self.num_batches_tracked += is_filled
        iters = self.num_batches_tracked.clone()
        size = len(self.buffer_x2)
        slot = iters % size
        good = batch_square.isfinite() & (is_filled > 0)
        store(self.buffer_x2, slot, batch_square, good)
        averaging = (iters > size) & (iters >= self.warmup_iters)
        mean_square = torch.where(
            averaging, self.buffer_x2.mean(0, dtype=dtype), batch_square
        )
        running_var = self.running_var.to(dtype)
        ratio = (mean_square + self.eps) / (running_var + self.eps)
        ratio = ratio.sqrt().clamp(1 / RATIO_LIMIT, RATIO_LIMIT)
        trusted = iters > max(self.ratio_warmup_iters, self.warmup_iters)
        ratio = torch.where(trusted, ratio, torch.ones_like(ratio))
        new = torch.lerp(mean_square, running_var, self.momentum)
        good = new.isfinite() & torch.as_tensor(is_filled).bool()
        self.running_var.copy_(torch.where(good, new, running_var))
        call = _Call(batch_square, mean_square, ratio, slot, averaging)
        self._calls = [*self._calls[1 - REMEMBERED_CALLS :], call]
        return call

    def _recall(self, batch_square: Tensor) -> _Call:
        """The call whose batch this was, for a layer may be shared."""

        def error(call: _Call) -> Tensor:
            total = (call.batch_square - batch_square).abs().sum()
            return total.nan_to_num(torch.inf, torch.inf)  # the furthest off

        call = min(reversed(self._calls), key=error, default=None)
        # What is not finite leaves nothing behind, whichever call it is.
        allowed = RECALL_TOLERANCE * (batch_square + self.eps).sum()
        if call is None or error(call) > allowed:
            raise RuntimeError(
                f'MABN({self.num_features}): a backward pass does a forward '
                'again (activation checkpointing) that is none of the last '
                f'{REMEMBERED_CALLS} training forwards of this layer, which '
                'are all that it remembers. Let no more of them come before '
                'their backward pass, or do without checkpointing here '
                '(with_cp=False).'
            )
        return call

    def __getstate__(self):
        return dict(self.__dict__, _calls=[])

    def extra_repr(self) -> str:
        return (
            f'{self.num_features}, batch_size={self.batch_size}, '
            f'simulated_batch_size={self.simulated_batch_size}, '
            f'eps={self.eps}, momentum={self.momentum}, '
            f'warmup_iters={self.warmup_iters}, '
            f'ratio_warmup_iters={self.ratio_warmup_iters}'
        )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state_dict, prefix: str) -> None:
        """Rewrite another normalization's checkpoint in place."""
        own = {k: prefix + k for k in self.state_dict()}
        if f'{prefix}iters' in state_dict:  # the authors'
            iters = state_dict.pop(f'{prefix}iters')
            state_dict[own['num_batches_tracked']] = iters.reshape(())
            running_var = state_dict.get(own['running_var'])
            if running_var is not None:
                state_dict[own['running_var']] = running_var.flatten()
        elif f'{prefix}running_mean' in state_dict and all(
            len(state_dict.get(prefix + k, ())) == self.num_features
            for k in ('running_mean', 'running_var', 'weight', 'bias')
        ):  # BN's: the mean goes into the shift
            mean = state_dict.pop(f'{prefix}running_mean')
            var, weight, bias = (
                state_dict[own[k]] for k in ('running_var', 'weight', 'bias')
            )
            scale = weight / (var + self.eps).sqrt()
            mean_square = var + mean.square()
            state_dict[own['bias']] = bias - scale * mean
            state_dict[own['weight']] = scale * (mean_square + self.eps).sqrt()
            state_dict[own['running_var']] = mean_square
            # Its count says nothing of buffers, which are empty.
            size = self.buffer_x2.shape
            state_dict[own['buffer_x2']] = var.new_zeros(size)
            state_dict[own['buffer_gz']] = var.new_zeros(size)
            state_dict[own['num_batches_tracked']] = var.new_zeros(
                (), dtype=torch.long
            )
