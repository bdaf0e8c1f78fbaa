"""Many micro-batches in one forward, exactly as one after another.

An optimizer step of 32 images, normalized one image at a time, is 32 forwards
and backwards whose gradients add up. Only the normalizations make them differ
from one forward of 32 images, and each of them sees its micro-batches in the
same order either way. So it is enough that each normalization takes the batch
apart, which is many times faster. Estimates move from micro-batch to
micro-batch as they would; gradients are the same
(``tests/test_tools/test_study.py`` compares them).
"""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import BCN, BGN, MABN
from wsbcn_mm.functional import (
    exponential_share,
    micro_batch_coefficients,
    moments,
    normalize,
    rate_of_forward,
)
from wsbcn_mm.functional.mabn import _Scale
from wsbcn_mm.layers.mabn import RATIO_LIMIT


def normalize_in_micro_batches(model: nn.Module, images: int) -> None:
    """Let the normalizations of ``model`` see ``images`` at a time.

    Args:
        model (nn.Module): Changed in place, in training mode only.
        images (int): Images per normalization batch.
    """
    for module in model.modules():
        if type(module) is BCN and module.estimate:
            micro_batched = partial(_bcn, module)
        elif type(module) is nn.BatchNorm2d:
            micro_batched = partial(_bn, module)
        elif type(module) is BGN:
            micro_batched = partial(_bgn, module)
        elif type(module) is MABN:
            micro_batched = partial(_mabn, module)
        elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
            if type(module) is nn.GroupNorm:
                continue  # no image sees another
            micro_batched = partial(_any, module)
        else:
            continue
        module.forward = partial(
            _forward, module, module.forward, micro_batched, images
        )


def _forward(module, forward, micro_batched, images: int, x: Tensor):
    if not module.training:
        return forward(x)
    if len(x) % images:
        raise ValueError(
            f'A batch of {len(x)} images has no whole number of '
            f'micro-batches of {images}.'
        )
    return micro_batched(x, images=images, forward=forward)


def _any(module, x: Tensor, images: int, forward) -> Tensor:
    return torch.cat([forward(part) for part in x.split(images)])


def _bn(module, x: Tensor, images: int, forward) -> Tensor:
    return _batch_norm(module, x, images, module.weight, module.bias)


def _bgn(module, x: Tensor, images: int, forward) -> Tensor:
    """The runs are channels of a Batch Normalization."""
    runs = x.reshape(len(x), module.num_groups, -1)
    y = _batch_norm(module, runs, images).view_as(x)
    return y * module.weight[:, None, None] + module.bias[:, None, None]


def _batch_norm(module, x: Tensor, images: int, weight=None, bias=None):
    """One call for all micro-batches, as channels of their own."""
    parts, channels = len(x) // images, x.shape[1]
    y = x.unflatten(0, (parts, images)).transpose(0, 1).flatten(1, 2)
    mean, var = x.new_zeros(2, parts * channels)
    y = F.batch_norm(
        y.contiguous(),
        mean,
        var,
        None if weight is None else weight.repeat(parts),
        None if bias is None else bias.repeat(parts),
        training=True,
        momentum=1.0,
        eps=module.eps,
    )
    with torch.no_grad():
        rates = (module.momentum,) * parts
        for running, batch in (
            (module.running_mean, mean),
            (module.running_var, var),
        ):
            batch = batch.view(parts, channels)
            running.copy_(_averages(running, batch, rates)[-1])
        module.num_batches_tracked += parts
    return y.unflatten(1, (parts, channels)).transpose(0, 1).flatten(0, 1)


def _bcn(module, x: Tensor, images: int, forward) -> Tensor:
    """The estimates of every micro-batch from one matrix product."""
    mean, var = moments(x)
    parts = len(x) // images
    first = int(module.num_batches_tracked)
    counts = torch.arange(first + 1, first + parts + 1)
    rates = rate_of_forward(
        counts, module.momentum, module.momentum_annealing, torch.float64
    )
    rates = torch.as_tensor(rates, dtype=torch.float64).expand(parts).tolist()
    m, v = (t.unflatten(0, (parts, images)) for t in (mean, var))
    means = _averages(module.running_mean, m.mean(1), rates)
    before = torch.cat([module.running_mean[None], means[:-1]])
    squares = (v + (m - before[:, None]).square()).mean(1)
    variances = _averages(module.running_var, squares, rates)
    module.running_mean.copy_(means[-1])
    module.running_var.copy_(variances[-1])
    module.num_batches_tracked += parts
    coefficients = micro_batch_coefficients(
        means.repeat_interleave(images, 0),
        variances.repeat_interleave(images, 0),
        module.num_groups,
        module.eps,
        module.grad_averaging and partial(_grad_average, module, images),
        x[0, 0].numel(),
    )
    return normalize(
        x,
        mean,
        var,
        coefficients.__call__,  # by autograd: estimates of each image
        module.batch_weight,
        module.batch_bias,
        module.weight,
        module.bias,
    )


def _grad_average(module, images: int, statistics: Tensor) -> Tensor:
    """What the gradient of each image is fitted to, shape (4, N, C)."""
    parts = len(statistics) // images
    own = torch.eye(parts, dtype=torch.float64) / images
    own = own.repeat_interleave(images, 1)
    present = torch.stack(_pool(statistics, own), 1)
    averaging, seen = module.grad_averaging, module.grad_images
    after = seen.max() + images * torch.arange(1, parts + 1)
    order = seen.argsort(stable=True)  # the oldest, or none, first
    rows = torch.cat([module.grad_statistics[order].double(), present])
    if isinstance(averaging, int):
        since = after[:, None] - torch.cat([seen[order], after])
        inside = (since >= 0) & (since < averaging)
        inside[:, : len(seen)] &= seen[order] > 0
        weights = inside.double() / inside.sum(1, keepdim=True)
    else:
        shares = exponential_share(
            (after - images).double(), averaging, images
        )
        weights = _decay(tuple((1 - shares).tolist()))
    joined = torch.stack(_pool(rows, weights), 1)
    kept = present if isinstance(averaging, int) else joined
    for part in range(max(parts - len(seen), 0), parts):
        slot = order[part % len(seen)]
        module.grad_statistics[slot] = kept[part].to(statistics)
        seen[slot] = after[part]
    joined = joined.transpose(0, 1).to(statistics)
    return joined.repeat_interleave(images, 1)


def _pool(statistics: Tensor, weights: Tensor):
    """``pool_statistics`` for every row of weights, in float64."""
    mean, var, grad, cov = statistics.double().unbind(1)
    pooled_mean, pooled_grad = weights @ mean, weights @ grad
    return (
        pooled_mean,
        weights @ (var + mean.square()) - pooled_mean.square(),
        pooled_grad,
        weights @ (cov + mean * grad) - pooled_mean * pooled_grad,
    )


def _mabn(module, x: Tensor, images: int, forward) -> Tensor:
    """An optimizer step goes once through the buffers of the last batches."""
    parts = len(x) // images
    size = len(module.buffer_x2)
    if size != parts:
        raise ValueError(
            f'MABN averages over {size} micro-batches of a step of {parts}; '
            'simulated_batch_size must be that of the step.'
        )
    mean, var = moments(x)
    iters = torch.arange(parts) + int(module.num_batches_tracked) + 1
    slots = iters % size
    averaging = (iters > size) & (iters >= module.warmup_iters)

    def last_batches(buffer: Tensor, values: Tensor) -> Tensor:
        """Means of the buffer as each micro-batch comes in, or its own."""
        old = buffer[slots]
        means = values.cumsum(0) + old.sum(0) - old.cumsum(0)
        buffer[slots] = values
        return torch.where(averaging[:, None], means / size, values)

    with torch.no_grad():
        square = (var + mean.square()).unflatten(0, (parts, images)).mean(1)
        mean_square = last_batches(module.buffer_x2, square)
        rates = [1 - module.momentum] * parts
        after = _averages(module.running_var, mean_square, rates)
        before = torch.cat([module.running_var[None], after[:-1]])
        ratio = (mean_square + module.eps) / (before + module.eps)
        ratio = ratio.sqrt().clamp(1 / RATIO_LIMIT, RATIO_LIMIT)
        trusted = iters > max(module.ratio_warmup_iters, module.warmup_iters)
        ratio = torch.where(trusted[:, None], ratio, 1)
        module.running_var.copy_(after[-1])
        module.num_batches_tracked += parts
    length = x[0, 0].numel()

    def coefficients(mean, var, weight, bias):
        energy = (var + mean.square()) * length
        energy = energy.unflatten(0, (parts, images)).sum(1)
        scale = _Scale.apply(
            energy,
            weight.expand(parts, -1),
            mean_square,
            ratio,
            module.eps,
            lambda psi: last_batches(
                module.buffer_gz, psi / (images * length)
            ),
        ).repeat_interleave(images, 0)
        return scale, mean * scale + bias

    return normalize(x, mean, var, coefficients, module.weight, module.bias)


def _averages(old: Tensor, batches: Tensor, rates) -> Tensor:
    """``old``, moved by each batch in turn at its rate: all that results."""
    weights = _decay(tuple(rates)).to(batches)
    return torch.addmm(weights[:, :1] * old, weights[:, 1:], batches)


@lru_cache(maxsize=64)
def _decay(rates: tuple) -> Tensor:
    """What each estimate is made of: the old one, then each batch.

    Row t of the result weighs ``(old, batch_0, ..., batch_t)`` after the
    update ``estimate += rates[t] * (batch_t - estimate)``.
    """
    row = torch.zeros(len(rates) + 1, dtype=torch.float64)
    row[0] = 1
    rows = []
    for t, rate in enumerate(rates):
        row = row * (1 - rate)
        row[t + 1] = rate
        rows.append(row)
    return torch.stack(rows)
