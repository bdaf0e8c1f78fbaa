import os
import subprocess
import sys
from pathlib import Path

import kernel_parity
import pytest
import torch

from wsbcn_mm.functional import kernels

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA GPU: none here'
)


@pytest.mark.parametrize('name', ['plain', 'cpu'])
def test_parity_on_cpu(name):
    kernel_parity.run(name, 'cpu', examples=60)


def test_parity_of_triton_kernels_in_the_interpreter():
    pytest.importorskip('triton')
    if torch.cuda.is_available():
        pytest.skip('they run on the GPU itself here')
    subprocess.run(
        [sys.executable, kernel_parity.__file__, 'fused'],
        check=True,
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        cwd=Path(__file__).parents[2],
        timeout=300,
    )


@needs_cuda
@pytest.mark.parametrize('name', ['plain', 'cuda', 'fused'])
def test_parity_on_cuda(name):
    kernel_parity.run(name, 'cuda', examples=100)


@pytest.fixture
def formulas(monkeypatch):
    """PyTorch's CUDA kernels by their formulas, as in Normalization.cuh."""

    def stats(x, eps):
        var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
        inverse = torch.where(var + eps == 0, 0, (var + eps).rsqrt())
        return mean, inverse

    def elemt(x, weight, bias, mean, inverse, eps):
        x, weight, bias, mean, inverse = (
            t.double() for t in (x, weight, bias, mean, inverse)
        )
        rows = (1, -1, 1)
        result = (x - mean.view(rows)) * (weight * inverse).view(rows)
        return (result + bias.view(rows)).to(dtype)

    def backward_reduce(grad, x, mean, inverse, weight, *wanted):
        centered = x.double() - mean.double().view(1, -1, 1)
        product = (grad.double() * centered).sum((0, 2))
        return grad.double().sum((0, 2)), product, None, None

    def backward_elemt(grad, x, mean, inverse, weight, total, product, count):
        mean, inverse, weight, total, product = (
            t.double().view(1, -1, 1)
            for t in (mean, inverse, weight, total, product)
        )
        factor = inverse.square() * product / count.sum()
        result = grad.double() - total / count.sum()
        result = result - (x.double() - mean) * factor
        return (result * weight * inverse).to(dtype)

    dtype = torch.float64
    monkeypatch.setattr(torch, 'batch_norm_stats', stats)
    monkeypatch.setattr(torch, 'batch_norm_elemt', elemt)
    monkeypatch.setattr(torch, 'batch_norm_backward_reduce', backward_reduce)
    monkeypatch.setattr(torch, 'batch_norm_backward_elemt', backward_elemt)


def test_cuda_kernels_are_handed_the_right_numbers(formulas):
    kernel_parity.run('cuda', 'cpu', examples=40, dtypes=(torch.float64,))


def test_cuda_kernels_divide_by_no_scale_of_zero(formulas):
    x, grad = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    small = torch.randn(4, 2, 3, dtype=torch.float64)
    small[1, 0] = 0  # the scale, as a residual block's last norm has it
    torch.testing.assert_close(
        kernels.cuda.input_grad(grad, x, *small),
        kernels.plain.input_grad(grad, x, *small),
    )


def test_select_takes_the_definition_where_operations_are_followed():
    x = torch.randn(1, 2, 3)
    assert kernels.select(x) is kernels.cpu
    assert kernels.select(torch.empty(0, 2, 3)) is kernels.plain
    seen = []
    torch.func.vmap(lambda x: seen.append(kernels.select(x)) or x)(x)
    with torch.device('meta'):
        seen.append(kernels.select(torch.empty(1, 2, 3)))
    assert seen == [kernels.plain] * 2


def test_use_is_undone():
    x = torch.randn(1, 2, 3)
    with pytest.raises(KeyError), kernels.use('cpu', kernels.plain):
        assert kernels.select(x) is kernels.plain
        raise KeyError
    assert kernels.select(x) is kernels.cpu


@pytest.mark.parametrize('mean', [0, 1, 5, 30, 1e3])
def test_moments_of_many_positions(mean):
    """Whichever way the CPU takes for a mean that far from zero."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 200, 304) * torch.tensor([1, 2, 3]).view(3, 1, 1)
    x += mean
    wide_mean, wide_var = kernels.plain.moments(x.double())
    got_mean, got_var = kernels.cpu.moments(x)
    std = wide_var.sqrt()
    assert ((got_mean - wide_mean).abs() < 2e-6 * (std + mean)).all()
    assert ((got_var - wide_var).abs() < 2e-5 * wide_var).all()


def test_pieces_cover_activations_larger_than_one(monkeypatch):
    monkeypatch.setattr(kernels.cpu, '_PIECE', 16)
    kernel_parity.run('cpu', 'cpu', examples=60)
