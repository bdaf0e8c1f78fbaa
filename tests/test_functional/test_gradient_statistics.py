import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsbcn_mm.functional import (
    AveragedGradientCoefficients,
    BatchChannelCoefficients,
    LargeBatchChannelCoefficients,
    exponential_share,
    is_in_window,
    join_statistics,
    kernels,
    moments,
    normalize,
    pool_statistics,
    subtract_fit,
)
from wsbcn_mm.functional.kernels import compiled
from wsbcn_mm.functional.kernels.parity import Average
from wsbcn_mm.functional.vjp import autograd_vjp

F64 = torch.float64


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance
    )


def statistics_of(x, h):
    """Of values, shape (n, C): the definition."""
    a, g = x.mean(0), h.mean(0)
    cov = ((x - a) * (h - g)).mean(0)
    return torch.stack([a, x.var(0, correction=0), g, cov])


def same_for_all(statistics):
    share = statistics.new_full((len(statistics),), 1 / len(statistics))
    return pool_statistics(statistics, share)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    offset=st.sampled_from([0, 100]),
    seed=st.integers(0, 99),
)
def test_statistics_of_a_union_follow_from_those_of_its_parts(
    sizes, offset, seed
):
    torch.manual_seed(seed)
    x, h = torch.randn(2, sum(sizes), 3, dtype=F64) + offset
    parts = torch.stack(
        [statistics_of(*part) for part in zip(x.split(sizes), h.split(sizes))]
    )
    share = torch.tensor(sizes, dtype=F64) / sum(sizes)
    close(pool_statistics(parts, share), statistics_of(x, h))
    joined, count = parts[0], sizes[0]
    for part, size in zip(parts[1:], sizes[1:]):
        joined = join_statistics(joined, part, count / (count + size))
        count += size
    close(joined, statistics_of(x, h))


def test_a_window_takes_calls_before_which_fewer_images_came():
    def inside(images, window, present):
        return is_in_window(torch.tensor(images), window, present).tolist()

    assert inside([0, 0, 0], 4, 1) == [False] * 3
    assert inside([3, 1, 2], 4, 1) == [True] * 3
    assert inside([3, 4, 2], 3, 1) == [True, True, False]
    assert inside([4, 0, 2], 6, 2) == [True, False, True]
    assert inside([4, 6, 2], 6, 2) == [True, True, False]
    assert inside([4, 6, 2], 4, 9) == [False] * 3


@pytest.mark.parametrize('rate', [0.05, 0.9])
def test_shares_of_an_exponential_average_are_the_debiased_ones(rate):
    weights, images = {}, 0
    for value, present in enumerate([1, 3, 2, 1]):
        share = exponential_share(images, rate, present)
        weights = {k: share * w for k, w in weights.items()}
        weights[value] = 1 - share
        images += present
        as_tensor = exponential_share(
            torch.tensor(images - present, dtype=F64), rate, present
        )
        assert as_tensor.item() == pytest.approx(share, abs=1e-15)
    ages = {0: (6, 1), 1: (3, 3), 2: (1, 2), 3: (0, 1)}  # images since, of it
    wanted = {
        k: (1 - rate) ** since * (1 - (1 - rate) ** n)
        for k, (since, n) in ages.items()
    }
    total = sum(wanted.values())
    for k, w in wanted.items():
        assert weights[k] == pytest.approx(w / total)


def residual(g, x, eps):
    """Of the least-squares fit of g on 1 and x: the definition."""
    residuals = []
    for a, b in zip(*(t.transpose(0, 1).flatten(1) for t in (x, g))):
        design = torch.stack([torch.ones_like(a), a - a.mean()], 1)
        penalty = torch.tensor([[0, (len(a) * eps) ** 0.5]], dtype=F64)
        coefficients = torch.linalg.lstsq(
            torch.cat([design, penalty]),
            torch.cat([b, b.new_zeros(1)])[:, None],
        ).solution
        residuals.append(b - (design @ coefficients)[:, 0])
    return torch.stack(residuals).view(g.transpose(0, 1).shape).transpose(0, 1)


def estimates_and_parameters(channels, num_groups, offset):
    running_mean = torch.randn(channels, dtype=F64) + offset
    running_var = torch.rand(channels, dtype=F64) + 0.5
    parameters = [
        torch.rand(n, dtype=F64) + 0.5
        for n in (channels, channels, num_groups, num_groups)
    ]
    return running_mean, running_var, parameters


@settings(max_examples=40)
@given(
    samples=st.integers(1, 3),
    num_groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    size=st.sampled_from([(5,), (3, 4), (2, 3, 2)]),
    offset=st.sampled_from([0, 10]),
    eps=st.sampled_from([1e-5, 0.1]),
    seed=st.integers(0, 99),
)
def test_the_gradient_is_fitted_to_the_activations(
    samples, num_groups, per_group, size, offset, eps, seed
):
    torch.manual_seed(seed)
    channels = num_groups * per_group
    x, grad = torch.randn(2, samples, channels, *size, dtype=F64)
    x = x + offset
    running_mean, running_var, parameters = estimates_and_parameters(
        channels, num_groups, offset
    )
    constants = running_mean, running_var, num_groups, eps
    coefficients = AveragedGradientCoefficients(
        *constants, same_for_all, x[0, 0].numel()
    )
    mean, var = moments(x)
    leaf = x.clone().requires_grad_()
    parameters = [p.requires_grad_() for p in parameters]
    y = normalize(leaf, mean, var, coefficients, *parameters)
    y.backward(grad)

    other = x.clone().requires_grad_()
    others = [p.detach().requires_grad_() for p in parameters]
    z = normalize(
        other, mean, var, BatchChannelCoefficients(*constants), *others
    )
    z.backward(grad)
    close(y, z, 0)
    for a, b in zip(parameters, others):
        close(a.grad, b.grad)
    close(leaf.grad, residual(other.grad, x, eps), 1e-8)


@settings(max_examples=40)
@given(
    samples=st.integers(1, 4),
    num_groups=st.integers(1, 3),
    per_group=st.integers(1, 4),
    eps=st.sampled_from([0.0, 1e-5, 0.1]),
    seed=st.integers(0, 99),
)
def test_with_a_batchs_own_statistics_it_is_batch_normalizations(
    samples, num_groups, per_group, eps, seed
):
    """The idea: the fit takes out what the statistics' gradient does."""
    torch.manual_seed(seed)
    channels = num_groups * per_group
    x, grad = torch.randn(2, samples, channels, 3, 4, dtype=F64)
    x = 3 * x + 2
    _, _, parameters = estimates_and_parameters(channels, num_groups, 0)
    results = []
    for coefficients in (
        AveragedGradientCoefficients(
            x.mean((0, 2, 3)),
            x.var((0, 2, 3), correction=0),
            num_groups,
            eps,
            same_for_all,
            12,
        ),
        LargeBatchChannelCoefficients(num_groups, eps),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        y = normalize(leaves[0], *moments(x), coefficients, *leaves[1:])
        y.backward(grad)
        results.append([y.detach(), *(t.grad for t in leaves)])
    for got, expected in zip(*results):
        close(got, expected)


@pytest.mark.parametrize('eps', [0.0, 1e-5])
def test_closed_form_is_the_gradient_of_the_definition(eps):
    mean, var = torch.randn(3, 6, dtype=F64), torch.rand(3, 6, dtype=F64)
    running_mean, running_var, parameters = estimates_and_parameters(6, 2, 0)
    parameters = [p.requires_grad_() for p in parameters]
    coefficients = AveragedGradientCoefficients(
        running_mean, running_var, 2, eps, same_for_all, 20
    )
    scale, shift, pull_back = coefficients.vjp(mean, var, *parameters)
    expected = autograd_vjp(coefficients, mean, var, *parameters)
    close((scale, shift), expected[:2])
    grads = torch.randn(2, 3, 6, dtype=F64)
    close(pull_back(*grads), expected[2](*grads))


def test_a_shift_or_scaling_of_a_channel_has_no_gradient():
    """Whatever the estimates, without eps."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 4, 6, 5, dtype=F64)
    running_mean, running_var, parameters = estimates_and_parameters(6, 2, 3)
    coefficients = AveragedGradientCoefficients(
        running_mean, running_var, 2, 0.0, same_for_all, 5
    )
    x.requires_grad_()
    y = normalize(x, *moments(x), coefficients, *parameters)
    y.backward(grad)
    close(x.grad.sum((0, 2)), torch.zeros(6, dtype=F64))
    close((x.grad * x.detach()).sum((0, 2)), torch.zeros(6, dtype=F64))


def test_a_constant_channel_without_eps():
    x = torch.ones(2, 4, 3, dtype=F64, requires_grad=True)
    estimates = torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)
    coefficients = AveragedGradientCoefficients(
        *estimates, 1, 0.0, same_for_all, 3
    )
    parameters = [torch.rand(n, dtype=F64) for n in (4, 4, 1, 1)]
    y = normalize(x, *moments(x), coefficients, *parameters)
    y.square().sum().backward()
    assert x.grad.isfinite().all()


def test_a_gradient_of_a_gradient_is_refused():
    x = torch.randn(2, 4, 3, requires_grad=True)
    coefficients = AveragedGradientCoefficients(
        torch.zeros(4), torch.ones(4), 2, 1e-5, same_for_all, 3
    )
    parameters = [torch.rand(n) for n in (4, 4, 2, 2)]
    y = normalize(x, *moments(x), coefficients, *parameters)
    with pytest.raises(RuntimeError, match='create_graph.*grad_averaging'):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.skipif(not compiled.is_built, reason='no C++ compiler')
@pytest.mark.parametrize('share', [0.0, 0.3])
@pytest.mark.parametrize('affine', ['group', 'channel'])
@pytest.mark.parametrize('shape', [(1, 6, 7), (3, 6, 9, 11), (2, 6, 60, 60)])
def test_compiled_kernels_fit_as_the_definition_does(shape, affine, share):
    x, grad = torch.randn(2, *shape)
    x = 2 * x + 1
    running_mean, running_var, parameters = estimates_and_parameters(6, 3, 1)
    if affine == 'channel':
        parameters[2:] = [torch.rand(6, dtype=F64) for _ in range(2)]
    history = torch.rand(4, 6, dtype=F64)
    results = []
    for backend, dtype in ((compiled, torch.float32), (kernels.plain, F64)):
        average = Average(history, share)
        coefficients = AveragedGradientCoefficients(
            running_mean.to(dtype),
            running_var.to(dtype),
            *(3, 1e-5, average, x[0, 0].numel()),
        )
        leaves = [
            t.to(dtype, copy=True).requires_grad_() for t in (x, *parameters)
        ]
        with kernels.use('cpu', backend):
            y = normalize(
                leaves[0],
                *moments(leaves[0]),
                coefficients,
                *leaves[1:],
            )
            y.backward(grad.to(dtype))
        assert len(average.updates) == 2
        results.append(
            [t.double() for t in (*average.updates, leaves[0].grad)]
            + [t.grad.double() for t in leaves[1:]]
        )
    for got, expected in zip(*results):
        bound = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=bound)


@pytest.mark.skipif(not compiled.is_built, reason='no C++ compiler')
def test_compiled_kernels_keep_what_overflows_in_its_channel():
    x, grad = torch.randn(2, 2, 6, 40)
    grad[0, 1, 3] = float('nan')
    average = Average(torch.rand(4, 6, dtype=F64), 0.5)
    coefficients = AveragedGradientCoefficients(
        torch.zeros(6), torch.ones(6), 6, 1e-5, average, 40
    )
    parameters = [torch.rand(n) for n in (6, 6, 6, 6)]
    with kernels.use('cpu', compiled):
        x.requires_grad_()
        normalize(x, *moments(x), coefficients, *parameters).backward(grad)
    finite = torch.tensor([True, False, True, True, True, True])
    for t in (*average.updates, x.grad.sum((0, 2))[None]):
        close(t.isfinite()[-1], finite, 0)


def test_length_counts_positions_not_images():
    """The same positions in one image or in several have one fit."""
    grads = torch.randn(2, 1, 4, dtype=F64)
    mean, var = torch.randn(2, 1, 4, dtype=F64).abs()
    settings = dict(eps=1e-5, average=same_for_all)
    once = subtract_fit(*grads, mean, var, length=6, **settings)
    twice = subtract_fit(
        *(t.repeat(2, 1) / 2 for t in grads),
        mean.repeat(2, 1),
        var.repeat(2, 1),
        length=3,
        **settings,
    )
    for a, b in zip(once, twice):
        close(a.expand(2, -1), 2 * b)
