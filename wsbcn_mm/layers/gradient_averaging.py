"""Averages of the backward pass, as buffers."""

import numbers
import warnings
from typing import Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ..functional import (
    exponential_share,
    is_functorch,
    is_in_window,
    join_statistics,
    pool_statistics,
)
from .batch import Batch

FLOAT16 = (
    'BCN with grad_averaging remembers gradients of the last images, and in '
    'float16 the scale of the loss may change between them. If it does, add '
    "custom_hooks=[dict(type='LossScaleHook')] to the config, or call "
    'wsbcn_mm.set_loss_scale(model, scaler.get_scale()) before each backward '
    'pass; else call it once with 1.'
)


def check_grad_averaging(layer: str, value) -> Union[int, float, None]:
    """Return ``value`` if it is a window, a rate or None, else raise."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f'{layer}: grad_averaging must be a number of images, a rate or '
            f'None, got {value!r} ({type(value).__name__})'
        )
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ValueError(
                f'{layer}: grad_averaging must be at least 1 image, got '
                f'{value}'
            )
        return int(value)
    if not 0 < value < 1:
        raise ValueError(
            f'{layer}: grad_averaging must be a number of images (an int) or '
            f'a rate between 0 and 1, got {value}'
        )
    return float(value)


def store(buffer: Tensor, slot: Tensor, value: Tensor, good: Tensor) -> None:
    """Put a value in a row of a buffer, where it is good.

    Args:
        buffer (Tensor): Shape (K, *).
        slot (Tensor): Which row, an integer.
        value (Tensor): Shape (*).
        good (Tensor): Whether to put it there, for each number or for all.
    """
    slot = slot.view(1)
    value = value.detach().to(buffer.dtype)
    old = buffer.index_select(0, slot)
    buffer.index_copy_(0, slot, torch.where(good, value, old))


def set_loss_scale(model: nn.Module, scale) -> None:
    """Say what the loss is multiplied by: before each backward pass.

    :class:`MABN`, and :class:`BCN` with ``grad_averaging``, remember
    gradients of the last batches. Where dynamic loss scaling (float16)
    changes the scale, those are otherwise off by the factor of the change
    until they are gone. :class:`LossScaleHook` calls this for MMEngine.

    Args:
        model (nn.Module): The model that has such layers.
        scale (float | Tensor): The scale, as ``GradScaler.get_scale()``.

    Example:
        >>> import torch
        >>> scaler = torch.amp.GradScaler('cpu')
        >>> set_loss_scale(BCN(8, 4, grad_averaging=16), scaler.get_scale())
    """
    for module in model.modules():
        if isinstance(module, RemembersGradients):
            module.loss_scale = scale


class RemembersGradients:
    """Mixin for a layer with averages of gradients, free of the loss scale.

    Attributes:
        loss_scale (float | Tensor | None): See :func:`set_loss_scale`.
    """

    loss_scale = None

    def scaled(self, grad: Tensor) -> Tensor:
        """What is remembered, at the scale of the present loss."""
        return grad if self.loss_scale is None else grad * self.loss_scale

    def unscaled(self, grad: Tensor) -> Tensor:
        """What is to be remembered of a gradient."""
        return grad if self.loss_scale is None else grad / self.loss_scale


class GradientAveraging(RemembersGradients):
    """Mixin for a layer with averaged statistics of the backward pass.

    Attributes:
        grad_averaging (int | float | None): A window of images, a rate of an
            image, or None for no averages; then there are no buffers.
        grad_statistics (Tensor): Those of the last calls, shape (window - 1,
            4, C), or an exponential average, shape (1, 4, C).
        grad_images (Tensor): How many images the layer had seen after each
            of these calls, 0 where there was none.
    """

    grad_averaging = None

    def _register_grad_statistics(
        self, grad_averaging, size: int, device=None, dtype=None
    ) -> None:
        self.grad_averaging = grad_averaging
        if grad_averaging is None:
            return
        rows = max(grad_averaging - 1, 1) if self.averages_window else 1
        self._register_statistic(
            'grad_statistics', rows, 4, size, device=device, dtype=dtype
        )
        self.register_buffer(
            'grad_images', torch.zeros(rows, dtype=torch.long, device=device)
        )
        self.statistics = *self.statistics, 'grad_statistics'

    @property
    def is_fitting(self) -> bool:
        """Whether a forward now has an averaged gradient."""
        return (
            self.training and self.estimate and self.grad_averaging is not None
        )

    @property
    def averages_window(self) -> bool:
        """Whether the averages are over a window, not exponential."""
        return isinstance(self.grad_averaging, int)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.grad_averaging is not None:
            self.grad_statistics.zero_()
            self.grad_images.zero_()

    def _grad_average(self, x: Tensor, batch) -> Optional['GradientAverage']:
        """The averages for a call that normalizes ``x`` with estimates."""
        if not self.is_fitting or batch is None:
            return None
        if is_functorch(x):
            raise RuntimeError(
                f'{type(self).__name__}({self.num_features}, grad_averaging='
                f'{self.grad_averaging}): torch.func transforms do not reach '
                'averages that move in the backward pass; set '
                'grad_averaging=None'
            )
        if (
            x.dtype == torch.float16
            and self.loss_scale is None
            and not torch.compiler.is_compiling()
        ):
            warnings.warn(FLOAT16, stacklevel=3)
        return GradientAverage(self, batch)

    def _fit_grad_statistics(self, state_dict, prefix: str) -> None:
        """Let averages begin anew where a checkpoint has no such ones."""
        names = 'grad_statistics', 'grad_images'
        found = [state_dict.get(prefix + name) for name in names]
        own = [getattr(self, name, None) for name in names]
        if own[0] is not None and any(
            t is None or t.shape != mine.shape for t, mine in zip(found, own)
        ):
            weight = state_dict.get(prefix + 'weight', own[0])
            found = [t.new_zeros(t.shape, device=weight.device) for t in own]
        for name, value in zip(names, found):
            state_dict.pop(prefix + name, None)
            if own[0] is not None:
                state_dict[prefix + name] = value


class GradientAverage:
    """A layer's averages, for the backward pass of one call.

    Calling it is :data:`wsbcn_mm.functional.Average`. The first backward pass
    of the call moves the averages. A second one, after ``retain_graph=True``,
    does not, and fits to its own gradient alone, since the first has already
    subtracted the part of the calls before. So the gradients of several
    losses add up to that of their sum.

    Args:
        layer (GradientAveraging): The layer.
        batch (Batch | SharedBatch): What the call normalizes.
    """

    def __init__(self, layer: GradientAveraging, batch):
        self._layer = layer
        self._batch = batch
        self._history = None
        self._has_moved = False

    def __call__(self, statistics: Tensor) -> Tensor:
        present = self._batch.pool(statistics, pool_statistics)
        history, share = self.history(present.dtype)
        joined = join_statistics(history, present, share)
        self.update(present, joined)
        return joined

    @property
    def is_local(self) -> bool:
        """Whether the call's images are those of this process."""
        return isinstance(self._batch, Batch)

    def history(self, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        """The statistics of the calls before, and their share in all."""
        if self._history is not None:  # whose gradient was subtracted
            statistics, share = self._history
            return torch.cat([statistics[:2], 0 * statistics[2:]]), share
        layer, present = self._layer, self._batch.num_samples
        statistics = layer.grad_statistics.to(dtype)
        if layer.averages_window:
            inside = is_in_window(
                layer.grad_images, layer.grad_averaging, present
            ).to(dtype)
            count = inside.sum()
            statistics = pool_statistics(
                statistics, inside / count.clamp(min=1)
            )
            share = count / (count + 1)
        else:
            images = layer.grad_images[0].to(dtype)
            share = exponential_share(images, layer.grad_averaging, present)
            statistics = statistics[0].clone()
        if layer.loss_scale is not None:
            parts = statistics[:2], layer.scaled(statistics[2:])
            statistics = torch.cat(parts)
        if not torch.compiler.is_compiling():
            self._history = statistics, share
        return statistics, share

    def update(self, present: Tensor, joined: Tensor) -> None:
        """Move the averages, unless the present call overflowed.

        Args:
            present (Tensor): The call's statistics, shape (4, C).
            joined (Tensor): With those of the calls before, shape (4, C).
        """
        if self._has_moved:
            return
        if not torch.compiler.is_compiling():
            self._has_moved = True
        layer, batch = self._layer, self._batch
        kept = present if layer.averages_window else joined
        if layer.loss_scale is not None:
            kept = torch.cat([kept[:2], layer.unscaled(kept[2:])])
        good = kept.sum() * 0 == 0  # neither infinite nor NaN
        if not self.is_local:
            good = good & batch.is_filled
        images = layer.grad_images
        slot = images.argmin()
        total = images.max() + batch.num_samples
        store(layer.grad_statistics, slot, kept, good)
        store(images, slot, total, good)
