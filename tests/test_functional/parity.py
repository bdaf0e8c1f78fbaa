"""Does each function of a backend compute what the definition does?"""

from functools import partial
from types import ModuleType
from typing import Callable, List, Tuple

import torch
from torch import Tensor

from wsbcn_mm.functional.coefficients import (
    batch_statistics,
    large_batch_channel_coefficients,
)
from wsbcn_mm.functional.estimates import rate_of_forward, updated_estimates
from wsbcn_mm.functional.gradient_statistics import (
    fitted,
    join_statistics,
    pool_statistics,
)
from wsbcn_mm.functional.kernels import backward, plain
from wsbcn_mm.functional.kernels.self_check import TOLERANCE
from wsbcn_mm.functional.kernels.self_check import check_close as _close
from wsbcn_mm.functional.kernels.self_check import check_layout as _is_laid_out
from wsbcn_mm.functional.kernels.self_check import waves as _waves
from wsbcn_mm.functional.vjp import autograd_vjp


def check(backend: ModuleType, x: Tensor, grad: Tensor) -> None:
    """Raise unless every function is right, to the rounding of its dtype.

    Args:
        backend (module): What :func:`wsbcn_mm.functional.kernels.select` could
            give.
        x, grad (Tensor): Activations and a gradient, of one shape, dtype,
            device and layout.
    """
    wide, wide_grad = (t.double().cpu() for t in (x, grad))
    large = TOLERANCE[x.dtype]
    small = TOLERANCE[plain.statistics_dtype(x.dtype)]

    mean, var = plain.moments(wide)
    std = var.sqrt()
    center, got_var = backend.moments(x)
    _close('mean', center, mean, small * (std + mean.abs()))
    bound = var + std * mean.abs() * 1e-2 + 1e-14
    _close('var', got_var, var, small * 10 * bound)

    scale, slope, shift = (
        (_waves(mean.shape, step) / (std + 1e-3)).to(center)
        for step in (0.7, 1.1, 1.9)
    )
    wide_center, wide_scale, wide_slope, wide_shift = (
        t.double().cpu() for t in (center, scale, slope, shift)
    )
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    x_size = plain.affine(wide, wide_center, one, zero).abs().amax()

    result = backend.affine(x, center, scale, shift)
    size = x_size * wide_scale.abs().max() + wide_shift.abs().max() + 1
    expected = plain.affine(wide, wide_center, wide_scale, wide_shift)
    _close('affine', result, expected, large * size)
    _is_laid_out(result, x)

    sums = backend.reduce(grad, x, center)
    wide_sums = plain.reduce(wide_grad, wide, wide_center)
    bound = small * max(x[0, 0].numel(), 1)
    _close('sum', sums[0], wide_sums[0], bound)
    _close('product', sums[1], wide_sums[1], bound * (x_size + 1e-6))

    result = backend.input_grad(grad, x, center, scale, slope, shift)
    expected = plain.input_grad(
        wide_grad, wide, wide_center, wide_scale, wide_slope, wide_shift
    )
    size = (
        wide_grad.abs().max() * wide_scale.abs().max()
        + x_size * wide_slope.abs().max()
        + wide_shift.abs().max()
    )
    _close('input_grad', result, expected, large * size)
    _is_laid_out(result, x)
    _check_batch_channel(backend, x, grad, center, got_var)
    _check_moved_estimates(backend, center, got_var)
    if hasattr(backend, 'batch_channel_forward'):
        _check_forward(backend, x, grad)
    if x[0].numel() > 1:
        _check_weight(backend, x, grad, x.dtype)
        # Large, so that no rounding hides where it is added.
        _check_weight(backend, x, grad, x.dtype, var_eps=0.25, std_eps=0.0)
        if x.dtype == torch.float32:  # under autocast
            _check_weight(backend, x, grad, torch.float16)


def _check_batch_channel(
    backend: ModuleType, x: Tensor, grad: Tensor, mean: Tensor, var: Tensor
) -> None:
    channels = mean.shape[1]
    num_groups = _num_groups(channels)
    for pairs in (num_groups, channels):
        *parameters, running_mean, running_var = (
            t.to(mean) for t in _parameters(channels, pairs)
        )
        inputs = [mean, var, *parameters]
        constants = dict(num_groups=num_groups, eps=1e-5)
        grads = [_waves(mean.shape, step).to(mean) for step in (1.3, 2.9)]
        results = []
        for module, dtype, device in (
            (backend, mean.dtype, mean.device),
            (plain, torch.float64, 'cpu'),
        ):
            scale, shift, pull_back = module.batch_channel(
                *(t.to(device, dtype) for t in inputs),
                running_mean=running_mean.to(device, dtype),
                running_var=running_var.to(device, dtype),
                **constants,
            )
            grads_of = pull_back(*(t.to(device, dtype) for t in grads))
            results.append((scale, shift, *grads_of))
        for got, expected in zip(*results):
            bound = TOLERANCE[mean.dtype] * (1 + expected.abs().max())
            _close('batch_channel', got, expected, bound)
        if not hasattr(backend, 'batch_channel_backward'):
            continue
        got = backend.batch_channel_backward(
            grad,
            x,
            *inputs,
            running_mean=running_mean,
            running_var=running_var,
            **constants,
        )
        if got is not None:
            # The definition was the last of the two.
            _check_backward(got, x, grad, mean, scale, pull_back)
        if got is None or not getattr(backend, 'averages_gradients', False):
            continue
        history = _waves((4, channels), 2.1) + 1.5
        averages = [Average(history, 0.3) for _ in range(2)]
        got = backend.batch_channel_backward(
            grad,
            x,
            *inputs,
            running_mean=running_mean,
            running_var=running_var,
            average=averages[0],
            **constants,
        )
        wide = [t.double().cpu() for t in (mean, var)]
        length = max(x[0, 0].numel(), 1)
        settings = dict(eps=1e-5, length=length, average=averages[1])
        _check_backward(
            got,
            x,
            grad,
            mean,
            scale,
            fitted(pull_back, scale, *wide, **settings),
        )
        for actual, wanted in zip(*(a.updates for a in averages)):
            bound = 3 * TOLERANCE[mean.dtype] * (1 + wanted.abs().max())
            _close('gradient statistics', actual, wanted, bound)


class Average:
    """What a gradient is fitted to besides: a layer's, without a layer.

    Args:
        history (Tensor): Statistics of calls before, shape (4, C), float64.
        share (float): Of them in all.
    """

    is_local = True

    def __init__(self, history: Tensor, share: float):
        self._history = history, history.new_tensor(share)
        self.updates = []

    def history(self, dtype: torch.dtype) -> Tuple[Tensor, ...]:
        return tuple(t.to(dtype) for t in self._history)

    def update(self, *statistics: Tensor) -> None:
        self.updates += statistics

    def __call__(self, statistics: Tensor) -> Tensor:
        even = statistics.new_full((len(statistics),), 1 / len(statistics))
        present = pool_statistics(statistics, even)
        history, share = self.history(present.dtype)
        joined = join_statistics(history, present, share)
        self.update(present, joined)
        return joined


def _check_backward(
    got: Tuple[Tensor, ...],
    x: Tensor,
    grad: Tensor,
    mean: Tensor,
    scale: Tensor,
    pull_back: Callable,
) -> None:
    """Compare with the definition's passes, given its coefficients."""
    wide_grad, wide, center = (t.double().cpu() for t in (grad, x, mean))
    expected = backward(plain, wide_grad, wide, center, scale, pull_back)
    deviation = plain.affine(wide, center, scale, torch.zeros_like(scale))
    size = wide_grad.abs().max() * (scale.abs().max() + 1)
    bound = 3 * TOLERANCE[x.dtype] * (expected[0].abs().max() + size)
    _close('grad of x', got[0], expected[0], bound)
    _is_laid_out(got[0], x)
    size = wide_grad.abs().max() * (deviation.abs().max() + 1)
    size = size * x.numel() / x.shape[1] / 10  # errors of a sum cancel
    for actual, wanted in zip(got[1:], expected[1:]):
        bound = 3 * TOLERANCE[mean.dtype] * (wanted.abs().max() + size)
        _close('grad of a parameter', actual, wanted, bound)


def _check_moved_estimates(
    backend: ModuleType, mean: Tensor, var: Tensor
) -> None:
    old_mean, old_var = (
        (_waves(mean.shape[1:], step) + 1.5).to(mean) for step in (1, 2)
    )
    for momentum, annealing in ((None, False), (0.1, False), (0.1, True)):
        for count in (1, 1000):
            results = []
            for module, dtype, device in (
                (backend, mean.dtype, mean.device),
                (plain, torch.float64, 'cpu'),
            ):
                results.append(
                    module.moved_estimates(
                        *(t.to(device, dtype) for t in (mean, var)),
                        running_mean=old_mean.to(device, dtype),
                        running_var=old_var.to(device, dtype),
                        count=torch.tensor(count, device=device),
                        momentum=momentum,
                        annealing=annealing,
                    )
                )
            for got, expected in zip(*results):
                bound = TOLERANCE[mean.dtype] * (1 + expected.abs().max())
                _close('moved_estimates', got, expected, bound)


def _check_forward(backend: ModuleType, x: Tensor, grad: Tensor) -> None:
    """Compare with the definition's passes, one after the other."""
    wide = x.double().cpu()
    dtype = plain.statistics_dtype(x.dtype)
    channels = x.shape[1]
    count_values = x.numel() // channels
    num_groups = _num_groups(channels)
    constants = dict(num_groups=num_groups, eps=1e-5)
    for pairs, momentum, annealing, estimate in (
        (num_groups, 0.1, True, True),
        (channels, None, False, True),
        (num_groups, 0.1, False, False),
        (channels, None, False, False),
    ):
        *parameters, mean, var = (
            t.to(dtype) for t in _parameters(channels, pairs)
        )
        count = torch.tensor(3)
        moved = [t.to(x.device, copy=True) for t in (mean, var, count)]
        given = [t.to(x.device) for t in parameters]
        names = 'running_mean', 'running_var', 'count'
        settings = dict(estimate=estimate, **constants)
        result, small = backend.batch_channel_forward(
            x,
            *given,
            **dict(zip(names, moved)),
            momentum=momentum,
            annealing=annealing,
            **settings,
        )
        # As they were rounded: they are compared by themselves.
        moments = [t.double().cpu() for t in backend.moments(x)]
        rate = dict(count=count + 1, momentum=momentum, annealing=annealing)
        estimates = mean.double(), var.double()
        if estimate:
            used = estimates = plain.moved_estimates(
                *moments,
                running_mean=estimates[0],
                running_var=estimates[1],
                **rate,
            )
            scale, shift, wide_pull_back = plain.batch_channel(
                *moments,
                *(t.double() for t in parameters),
                running_mean=used[0],
                running_var=used[1],
                **constants,
            )
        else:
            used = batch_statistics(*moments)
            bessel = count_values / max(count_values - 1, 1)
            estimates = updated_estimates(
                *estimates,
                used[0],
                used[1] * bessel,
                rate_of_forward(**rate, dtype=torch.float64),
            )
            scale, shift, wide_pull_back = autograd_vjp(
                partial(large_batch_channel_coefficients, **constants),
                *moments,
                *(t.double().detach().requires_grad_() for t in parameters),
            )
        if moved[2].item() != 4:
            raise RuntimeError(f'count: {moved[2].item()} after 3')
        expected = plain.affine(wide, moments[0], scale, shift)
        # What the mean is rounded by is scaled along.
        size = expected.abs().amax() + scale.abs().amax() * wide.abs().amax()
        _close('forward', result, expected, 3 * TOLERANCE[x.dtype] * size)
        _is_laid_out(result, x)
        for name, got, wanted in zip(
            ('used_mean', 'used_var', 'running_mean', 'running_var'),
            (*small[2:], *moved),
            (*used, *estimates),
        ):
            size = 1 + wanted.abs().max() + moments[0].abs().max()
            _close(name, got, wanted, 10 * TOLERANCE[dtype] * size)
        _check_backward(
            backend.batch_channel_backward(
                *(grad, x, *small[:2], *given),
                **dict(zip(names, small[2:])),
                **settings,
            ),
            x,
            grad,
            moments[0].to(dtype),
            scale,
            wide_pull_back,
        )


def _check_weight(
    backend: ModuleType,
    weight: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
    var_eps: float = 0.0,
    std_eps: float = 1e-5,
) -> None:
    """Take activations for filters, whose weight another dtype may have."""
    wide, eps = weight.double().cpu(), (var_eps, std_eps)
    got, pull_back = backend.standardize_weight(weight, *eps, dtype)
    expected, wide_pull_back = plain.standardize_weight(wide, *eps, wide.dtype)
    rows = wide.flatten(1)
    inverse = 1 / ((rows.var(1) + var_eps).sqrt() + std_eps)
    # The mean is rounded, and that is scaled along.
    size = 1 + expected.abs().max() + (inverse * rows.abs().amax(1)).max()
    tolerance = TOLERANCE[plain.statistics_dtype(weight.dtype)]
    bound = tolerance * size + TOLERANCE[dtype] * expected.abs().max()
    _close('weight', got, expected, bound)
    if got.dtype != dtype:
        raise RuntimeError(f'weight: {got.dtype}, expected {dtype}')
    grad = grad.to(dtype)
    got = pull_back(grad)
    expected = wide_pull_back(grad.double().cpu())
    size = 3 * size * inverse.max() * grad.abs().max().double().cpu()
    bound = tolerance * size + TOLERANCE[weight.dtype] * expected.abs().max()
    _close('grad of weight', got, expected, bound)
    if got.dtype != weight.dtype:
        raise RuntimeError(
            f'grad of weight: {got.dtype}, expected {weight.dtype}'
        )


def _num_groups(channels: int) -> int:
    return 2 if channels % 2 == 0 else 1


def _parameters(channels: int, pairs: int) -> List[Tensor]:
    """Batch weight and bias, weight and bias, and the two estimates."""
    sizes = (channels, channels, pairs, pairs, channels, channels)
    return [_waves((n,), step) + 1.5 for step, n in enumerate(sizes, 1)]
