import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wsbcn_mm.functional import (
    BatchChannelCoefficients,
    LargeBatchChannelCoefficients,
    batch_statistics,
    moments,
    normalize,
)
from wsbcn_mm.functional.vjp import autograd_vjp

F64 = torch.float64


def without_closed_form(mean, var):
    """As where they come from several processes."""
    return batch_statistics(mean, var)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    samples=st.integers(0, 3),
    num_groups=st.integers(1, 4),
    per_group=st.integers(1, 5),
    affine=st.sampled_from(['group', 'channel']),
    offset=st.sampled_from([0, 100]),
    statistics=st.sampled_from([None, batch_statistics, without_closed_form]),
    seed=st.integers(0, 99),
)
def test_closed_form_is_the_gradient_of_the_definition(
    samples, num_groups, per_group, affine, offset, statistics, seed
):
    assume(samples or not statistics)
    torch.manual_seed(seed)
    channels = num_groups * per_group
    pairs = num_groups if affine == 'group' else channels
    mean = torch.randn(samples, channels, dtype=F64) + offset
    var = torch.rand(samples, channels, dtype=F64)
    parameters = [
        torch.randn(n, dtype=F64, requires_grad=True)
        for n in (channels, channels, pairs, pairs)
    ]
    if statistics:
        coefficients = LargeBatchChannelCoefficients(
            num_groups, 1e-5, statistics
        )
    else:
        coefficients = BatchChannelCoefficients(
            torch.randn(channels, dtype=F64) + offset,
            torch.rand(channels, dtype=F64) + 0.1,
            num_groups,
            1e-5,
        )
    kept = mean.clone(), var.clone()
    scale, shift, pull_back = coefficients.vjp(mean, var, *parameters)
    expected = autograd_vjp(coefficients, mean, var, *parameters)
    torch.testing.assert_close((scale, shift), expected[:2])
    grads = torch.randn(2, samples, channels, dtype=F64)
    # Twice, as with retain_graph.
    for _ in range(2):
        torch.testing.assert_close(
            pull_back(*grads), expected[2](*grads), rtol=1e-9, atol=1e-9
        )
    torch.testing.assert_close((mean, var), kept, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    x = torch.randn(2, 6, 5, 5, dtype=dtype, requires_grad=True)
    parameters = [
        torch.randn(n, dtype=dtype, requires_grad=True) for n in (6, 6, 2, 2)
    ]
    coefficients = BatchChannelCoefficients(
        torch.zeros(6), torch.ones(6), 2, 1e-5
    )
    y = normalize(x, *moments(x), coefficients, *parameters)
    y.sum().backward()
    for t in (x, *parameters):
        assert t.grad.dtype == dtype and t.grad.isfinite().all()


def test_an_edited_parameter_is_noticed():
    x = torch.randn(1, 4, 3, 3)
    parameters = [torch.ones(4, requires_grad=True) for _ in range(4)]
    coefficients = BatchChannelCoefficients(
        torch.zeros(4), torch.ones(4), 4, 1e-5
    )
    y = normalize(x, *moments(x), coefficients, *parameters)
    with torch.no_grad():
        parameters[2].mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace'):
        y.sum().backward()
