"""How estimates of batch statistics move."""

from typing import Optional, Tuple, Union

import torch
from torch import Tensor

from .coefficients import batch_statistics


def rate_of_forward(
    count: Tensor,
    momentum: Optional[float],
    annealing: bool,
    dtype: torch.dtype,
) -> Union[float, Tensor]:
    """The update rate of a training forward.

    Args:
        count (Tensor): The number of this forward, from 1.
        momentum (float | None): The update rate r. None: the cumulative
            average of all forwards, ``1 / count``.
        annealing (bool): Whether it is ``max(r, 1 / (1 + count))``.
        dtype (torch.dtype): Of the result, where it is a tensor.
    """
    if momentum is None:
        return count.to(dtype).reciprocal()
    if annealing:
        return (count.to(dtype) + 1).reciprocal().clamp(min=momentum)
    return momentum


def updated_estimates(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, rate
) -> Tuple[Tensor, Tensor]:
    r"""Move estimates by a share ``rate`` towards a batch's statistics.

    .. math::
        \mu \leftarrow \mu + r (m - \mu), \qquad
        \sigma^2 \leftarrow \sigma^2 + r (v - \sigma^2)

    A channel with an infinite or NaN statistic keeps its estimates: one
    overflow in float16 must not poison them for good.

    Args:
        running_mean, running_var (Tensor): The old estimates, shape (C,).
        mean, var (Tensor): The batch's statistics, shape (C,).
        rate (float | Tensor): The update rate r.
    """
    new_mean = torch.lerp(running_mean, mean, rate)
    new_var = torch.lerp(running_var, var, rate)
    good = (new_mean + new_var) * 0 == 0  # neither infinite nor NaN
    return (
        torch.where(good, new_mean, running_mean),
        torch.where(good, new_var, running_var),
    )


def estimates_from_moments(
    mean: Tensor,
    var: Tensor,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor,
    momentum: Optional[float],
    annealing: bool,
) -> Tuple[Tensor, Tensor]:
    """Move estimates towards the statistics of a batch with these moments.

    The squares are taken about the old mean, as the authors of Batch-Channel
    Normalization do.

    Args:
        mean, var (Tensor): Moments of the samples, shape (N, C).
        running_mean, running_var (Tensor): The old estimates, shape (C,).
        count, momentum, annealing: See :func:`rate_of_forward`.

    Returns:
        tuple[Tensor]: The new estimates, in the dtype of the moments.
    """
    old_mean, old_var = running_mean.to(mean.dtype), running_var.to(var.dtype)
    return updated_estimates(
        old_mean,
        old_var,
        *batch_statistics(mean, var, old_mean),
        rate_of_forward(count, momentum, annealing, mean.dtype),
    )
