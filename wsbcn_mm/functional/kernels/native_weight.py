r"""Weight Standardization by PyTorch's normalizations, one pass each way.

Group Normalization, with a group a filter, gives :math:`z = c / \sigma` with
the centred weight :math:`c` and the biased :math:`\sigma`. Ours, with the
unbiased :math:`s = \sigma \sqrt{K / (K - 1)}` over K weights, is a factor a
filter away:

.. math::
    \hat W = \frac{c}{s + \epsilon} = \frac{z}{\sqrt{K / (K - 1)} +
    \epsilon / \sigma}

An :math:`\epsilon_v` inside the square root, :math:`s^2 = K \sigma^2 / (K - 1)
+ \epsilon_v`, is :math:`\epsilon_v (K - 1) / K` in that of the normalization.

The backward pass of Batch Normalization, with a channel a filter, is

.. math::
    \gamma r (g - \mathrm{mean}(g)) - \gamma r^3 c \langle g, c \rangle / K

for any :math:`r` in the place of :math:`1 / \sigma`. With :math:`i = 1 / (s +
\epsilon)` ours is :math:`i (g - \mathrm{mean}(g)) - i^2 c \langle g, c \rangle
/ (s (K - 1))`: the same for :math:`r^2 = i K / (s (K - 1))` and :math:`\gamma
= i / r`.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from .plain import filter_rows

# Added to variances: the least whose inverse root, cubed, is a float32.
_TINY = 1e-24


def standardize_weight(
    weight: Tensor, var_eps: float, std_eps: float, dtype: torch.dtype
) -> Tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same as in ``plain``."""
    rows = _memory_rows(weight)
    filters, count = rows.shape
    eps = max(var_eps * (count - 1) / count, _TINY)
    result, mean, inverse = torch.native_group_norm(
        rows[None], None, None, 1, filters, count, filters, eps
    )
    factor = (inverse * std_eps).add_((count / (count - 1)) ** 0.5)
    result *= factor.reciprocal()[..., None]

    def pull_back(grad: Tensor) -> Tensor:
        # i = inverse / factor, s = sqrt(count / (count - 1)) / inverse
        ratio = (count / (count - 1)) ** 0.25 * factor.rsqrt()
        result, _, _ = torch.ops.aten.native_batch_norm_backward(
            _memory_rows(grad, like=weight)[None],
            _memory_rows(weight)[None],
            weight=(ratio * factor).reciprocal_()[0],
            running_mean=None,
            running_var=None,
            save_mean=mean[0],
            save_invstd=(inverse * ratio)[0],
            train=True,
            eps=0.0,
            output_mask=[True, False, False],
        )
        return _unflatten(result, weight).to(weight.dtype)

    return _unflatten(result, weight).to(dtype), pull_back


def _layout(weight: Tensor) -> Tuple[int, ...]:
    """The order of dimensions in memory, the filters first."""
    order = range(1, weight.dim())
    return (0, *sorted(order, key=lambda d: (-weight.stride(d), d)))


def _memory_rows(weight: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """:func:`filter_rows` in the order of memory: a view in any layout."""
    like = weight if like is None else like
    if not like.is_contiguous():
        weight = weight.permute(_layout(like))
    return filter_rows(weight).contiguous()


def _unflatten(rows: Tensor, weight: Tensor) -> Tensor:
    if weight.is_contiguous():
        return rows.view(weight.shape)
    order = _layout(weight)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rows.view([weight.shape[d] for d in order]).permute(inverse)
