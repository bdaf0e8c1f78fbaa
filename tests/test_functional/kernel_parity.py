"""Compare a backend with the definition in float64, on drawn inputs.

Also a script, since Triton interprets its kernels on a CPU only if the
process begins with TRITON_INTERPRET=1:

    TRITON_INTERPRET=1 python tests/test_functional/kernel_parity.py fused
"""

import importlib
import sys

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsbcn_mm.functional.kernels import plain

LAYOUTS = {
    3: ['contiguous', 'strided'],
    4: ['contiguous', 'channels_last', 'strided'],
    5: ['contiguous', 'channels_last_3d'],
}
EPSILON = {
    torch.float64: 1e-12,
    torch.float32: 3e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


@st.composite
def inputs(draw, dtypes=tuple(EPSILON)):
    """Activations and a gradient of one shape, dtype and layout."""
    sizes = st.integers(1, 9)
    shape = draw(
        st.tuples(st.integers(1, 3), sizes, sizes)
        | st.tuples(st.integers(1, 3), sizes, sizes, sizes)
        | st.tuples(st.integers(1, 2), sizes, sizes, sizes, sizes)
        | st.just((1, 2, 67, 71))  # several tiles
    )
    dtype = draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from(LAYOUTS[len(shape)]))
    mean, std = draw(
        st.sampled_from([(0.0, 1.0), (3.0, 1.0), (0.0, 1e-4), (1e3, 0.25)])
    )
    if dtype in (torch.float16, torch.bfloat16):
        mean = min(mean, 3.0)  # they hold no more digits
    torch.manual_seed(draw(st.integers(0, 99)))
    x, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x = (x * std + mean).to(dtype)
    return tuple(arranged(t.to(dtype), layout) for t in (x, grad))


def arranged(x, layout):
    if layout == 'strided':  # every other position of a larger tensor
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if layout == 'contiguous':
        return x
    return x.contiguous(memory_format=getattr(torch, layout))


def close(actual, expected, size, epsilon):
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).abs()
    assert (error <= epsilon * size).all(), (error / size).max()


def check(backend, x, grad, device='cpu'):
    """Every pass, to rounding in the dtype of statistics or of results."""
    wide, wide_grad = x.double(), grad.double()
    x, grad = x.to(device), grad.to(device)
    small = EPSILON[
        torch.float64 if x.dtype == torch.float64 else torch.float32
    ]
    large = EPSILON[x.dtype]
    length = max(x[0, 0].numel(), 1)

    mean, var = plain.moments(wide)
    got_mean, got_var = backend.moments(x)
    std = var.sqrt()
    close(got_mean, mean, std + mean.abs(), small)
    close(got_var, var, var + std * mean.abs() * 1e-2 + 1e-14, small * 10)

    center = got_mean
    scale, slope, shift = (
        (torch.randn_like(mean) / (std + 1e-3)).to(center.dtype)
        for _ in range(3)
    )
    args = [t.to(device) for t in (scale, slope, shift)]
    wide_args = [t.double() for t in (scale, slope, shift)]
    wide_center = center.double().cpu()
    x_size = (
        (wide - wide_center[(..., *[None] * (wide.dim() - 2))]).abs().amax()
    )
    size = x_size * wide_args[0].abs().max() + wide_args[2].abs().max()

    result = backend.affine(x, center, args[0], args[2])
    assert result.dtype == x.dtype
    assert result._base is None, 'a view breaks the ReLU that follows'
    close(
        result,
        plain.affine(wide, wide_center, wide_args[0], wide_args[2]),
        size + 1,
        large,
    )

    total, product = backend.reduce(grad, x, center)
    wide_total, wide_product = plain.reduce(wide_grad, wide, wide_center)
    close(total, wide_total, length, small)
    close(product, wide_product, length * (x_size + 1e-6), small)

    result = backend.input_grad(grad, x, center, *args)
    assert result.dtype == x.dtype
    close(
        result,
        plain.input_grad(wide_grad, wide, wide_center, *wide_args),
        wide_grad.abs().max() * wide_args[0].abs().max()
        + x_size * wide_args[1].abs().max()
        + wide_args[2].abs().max(),
        large,
    )
    for t in (backend.affine(x, center, args[0], args[2]), result):
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            assert t.is_contiguous(memory_format=torch.channels_last)


def backend(name):
    return importlib.import_module(f'wsbcn_mm.functional.kernels.{name}')


def run(name, device, examples, dtypes=tuple(EPSILON)):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(dtypes))
    def parity(drawn):
        check(backend(name), *drawn, device=device)

    parity()


if __name__ == '__main__':
    run(sys.argv[1], 'cpu', 30)
    print('parity holds')
