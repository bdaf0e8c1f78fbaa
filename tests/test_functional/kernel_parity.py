"""Compare a backend with the definition in float64, on drawn inputs.

Also a script, since Triton interprets its kernels on a CPU only if the
process begins with TRITON_INTERPRET=1:

    TRITON_INTERPRET=1 python tests/test_functional/kernel_parity.py fused
    python tests/test_functional/kernel_parity.py fused cuda 20
"""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import check

from wsbcn_mm import BCN
from wsbcn_mm.functional import kernels
from wsbcn_mm.functional.kernels.self_check import (
    TOLERANCE,
    check_first_use,
)

sys.path.append(str(Path(__file__).parents[2] / 'tools' / 'benchmarks'))
LAYOUTS = {
    3: ['contiguous', 'strided'],
    4: ['contiguous', 'channels_last', 'strided'],
    5: ['contiguous', 'channels_last_3d'],
}


@st.composite
def inputs(draw, dtypes=tuple(TOLERANCE)):
    """Activations and a gradient of one shape, dtype and layout."""
    sizes = st.integers(1, 9)
    shape = draw(
        st.tuples(st.integers(1, 3), sizes, sizes)
        | st.tuples(st.integers(1, 3), sizes, sizes, sizes)
        | st.tuples(st.integers(1, 2), sizes, sizes, sizes, sizes)
        # Several tiles, and as many as take a launch of their own.
        | st.sampled_from([(2, 2, 67, 71), (1, 64, 48, 48)])
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


def backend(name):
    return importlib.import_module(f'wsbcn_mm.functional.kernels.{name}')


def run(name, device, examples, dtypes=tuple(TOLERANCE)):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(dtypes))
    def parity(drawn):
        check(backend(name), *(t.to(device) for t in drawn))

    parity()


def check_layer(name, device='cpu'):
    """Two steps of a BCN, and one in evaluation, as with the definition."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 4e-2)):
        for arguments in ({}, dict(estimate=False), dict(grad_averaging=5)):
            _check_layer(
                name, device, dtype, tolerance, 7, momentum=0.1, **arguments
            )
    # Where a fourth sample, of zeros, would be divided by zero.
    _check_layer(name, device, torch.float32, 1e-3, 33, momentum=0.0, eps=0.0)


def _check_layer(name, device, dtype, tolerance, length, **arguments):
    results = []
    for module in (kernels.plain, backend(name)):
        torch.manual_seed(0)
        norm = BCN(12, num_groups=4, **arguments).to(device, dtype)
        x = torch.randn(3, 12, length, length).to(device, dtype)
        x.requires_grad_()
        with kernels.use(device, module):
            for _ in range(2):
                norm(x).square().mul(x.detach()).sum().backward()
            y = norm.eval()(x)
        parameters = [p.grad for p in norm.parameters()]
        results.append([y, x.grad, *parameters, *norm.buffers()])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def check_gradient_of_gradient(name, device='cpu'):
    """That of a gradient penalty, which the definition differentiates."""
    for estimate in (True, False):
        results = []
        for module in (kernels.plain, backend(name)):
            torch.manual_seed(0)
            norm = BCN(6, 2, momentum=0.1, estimate=estimate)
            norm.to(device, torch.float64)
            x = torch.randn(2, 6, 3, 3).to(device, torch.float64)
            x.requires_grad_()
            with kernels.use(device, module):
                y = norm(x).sin().sum()
                (grad,) = torch.autograd.grad(y, x, create_graph=True)
                grad.square().sum().backward()
            results.append([x.grad, *(p.grad for p in norm.parameters())])
        torch.testing.assert_close(*results)


def check_overflow(name, device='cpu'):
    """A channel that is not finite keeps its estimates, the others do not."""
    for value in (torch.inf, torch.nan):
        # In one tile, and in several.
        for length, estimate in ((5, True), (5, False), (67, True)):
            torch.manual_seed(0)
            x = torch.randn(2, 6, length, length).to(device, torch.float16)
            x[1, 4, 2, 3] = value
            norms = []
            for module in (kernels.plain, backend(name)):
                norm = BCN(6, 2, momentum=0.1, estimate=estimate)
                norm.to(device)
                with kernels.use(device, module):
                    norm(x)
                norms.append(norm)
            expected, norm = norms
            assert norm.running_mean[4] == 0 and norm.running_var[4] == 1
            assert (norm.running_mean != 0).sum() == 5, norm.running_mean
            torch.testing.assert_close(
                [*norm.buffers()], [*expected.buffers()]
            )


def check_many_tiles(device='cpu'):
    """More than ``join_moments`` looks at together, the last one cut off."""
    from wsbcn_mm.functional.kernels import fused_coefficients

    torch.manual_seed(0)
    rows, positions = 3, 4
    length = positions * (2 * fused_coefficients._AT_ONCE + 77) + 1
    x = torch.randn(rows, length, dtype=torch.float64) * 0.1 + 30
    tiles = x.split(positions, 1)
    mean = torch.stack([t.mean(1) for t in tiles], 1)
    var = torch.stack([t.var(1, correction=0) for t in tiles], 1)
    joined = torch.empty(2, rows, device=device)
    join = fused_coefficients.joining(rows, length, positions, len(tiles))
    join(*(t.to(joined) for t in (mean, var)), *joined)
    expected = torch.stack([x.mean(1), x.var(1, correction=0)])
    joined = joined.double().cpu()
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=0)


def check_layout_of_what_was_saved(name, device='cpu'):
    """Hooks, as those that move activations elsewhere, may change it."""
    x = torch.randn(2, 8, 48, 48, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for pack in (lambda t: t, torch.Tensor.contiguous):
        norm = BCN(8, 2).to(device)
        with (
            kernels.use(device, backend(name)),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            y = norm(x).square().sum()
            results.append(torch.autograd.grad(y, (x, *norm.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def check_launches():
    """What the README says of the launches of a layer on CUDA."""
    Launches = importlib.import_module('_launches').Launches
    fused = backend('fused')
    three = ['_tile_sums', '_input_coefficients', '_input_grad']
    for shape, estimate, backward in (
        ((4, 64, 7, 7), True, ['_whole_backward', 'sum']),
        ((4, 64, 7, 7), False, three),
        ((2, 64, 50, 76), True, three),
        ((2, 64, 50, 76), False, three),
    ):
        norm = BCN(64, momentum_annealing=True, estimate=estimate)
        x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
        with kernels.use('cpu', fused):
            launches = Launches()
            with launches.counted():
                y = norm(x)
                forward, launches.names = launches.names, []
                y.backward(grad)
            evaluation, norm = Launches(), norm.eval()
            with evaluation.counted(), torch.no_grad():
                norm(x)
        assert forward == ['_tile_moments', '_forward', '_affine'], forward
        assert launches.names == backward, launches.names
        assert evaluation.names == forward, evaluation.names


def check_devices():
    """Every launch is where a guard made the tensors' device current."""
    fused = backend('fused')
    kernel_type, guards, launched = type(fused._affine.jit), [], {}
    original = kernel_type.run

    @contextmanager
    def device_of(tensor):
        guards.append(tensor)
        yield
        guards.pop()

    def run(kernel, *args, **kwargs):
        name = kernel.fn.__name__
        launched[name] = launched.get(name, True) and bool(guards)
        return original(kernel, *args, **kwargs)

    with (
        mock.patch.object(torch.cuda, 'device_of', device_of),
        mock.patch.object(kernel_type, 'run', run),
    ):
        check(fused, *torch.randn(2, 1, 2, 67, 71))
        check_first_use(fused, torch.device('cpu'), torch.float32)
    assert launched.keys() >= {'_backward', '_whole_backward'}, launched
    assert all(launched.values()), launched


def check_asked_once(capability):
    """Triton looks at nothing again, whatever the number of channels."""
    from wsbcn_mm.functional.kernels.launch import Launch

    importlib.import_module('_stand_in').install(capability)
    asked, ask = [], Launch._ask_triton

    def asking(launch, *arguments):
        asked.append(launch.kernel.jit.fn.__name__)
        return ask(launch, *arguments)

    with (
        mock.patch.object(Launch, '_ask_triton', asking),
        kernels.use('cpu', backend('fused')),
    ):
        for shape in ((1, 18, 5, 7), (1, 18, 96, 96), (3, 3, 5, 5)):
            norm = BCN(shape[1], 3)
            for expected in (True, False):
                asked.clear()
                for mode in (True, False):
                    y = norm.train(mode)(torch.ones(shape).requires_grad_())
                    y.sum().backward()
                assert bool(asked) == expected, (shape, asked)


def check_compiled(capability):
    """What is launched again is what Triton would choose."""
    from triton.compiler import CompiledKernel

    from wsbcn_mm.functional import standardize_weight
    from wsbcn_mm.functional.kernels.launch import Launch

    importlib.import_module('_stand_in').install(capability)
    fused, launched, again = backend('fused'), [], set()
    of_grid, call = CompiledKernel.__getitem__, Launch.__call__

    def getitem(compiled, grid):
        run = of_grid(compiled, grid)

        def recorded(*arguments):
            launched.append((compiled, grid, arguments))
            run(*arguments)

        return recorded

    def checked(launch, *tensors, numbers=()):
        launched.clear()
        call(launch, *tensors, numbers=numbers)
        if launched:
            again.add(launch.kernel.jit.fn.__name__)
            ((compiled, grid, arguments),) = launched
            numbers = *launch.numbers, *numbers
            assert grid == (launch.programs, 1, 1)
            addresses = [t.data_ptr() for t in tensors]
            given = len(addresses) + len(numbers)
            assert arguments[:given] == (*addresses, *numbers)
            assert compiled is launch.kernel.jit.run(
                *(*tensors, *numbers, *launch.constants),
                grid=(launch.programs,),
                warmup=True,
                num_warps=launch.num_warps,
            )

    with (
        mock.patch.object(CompiledKernel, '__getitem__', getitem),
        mock.patch.object(Launch, '__call__', checked),
        kernels.use('cpu', fused),
    ):
        for shape in (
            *((1, 64, 8, 8), (2, 64, 8, 8), (3, 64, 5, 7), (1, 12, 96, 96)),
            *((1, 12, 97, 95), (1, 1, 3, 3), (9, 20, 4, 4), (1, 320, 1, 1)),
        ):
            for dtype in (torch.float32, torch.float16):
                for layout in (torch.contiguous_format, torch.channels_last):
                    x = torch.ones(shape, dtype=dtype)
                    shifted = x.new_ones(x.numel() + 1)[1:].view(shape)
                    x = x.contiguous(memory_format=layout)
                    for affine, estimate in (
                        ('group', True),
                        ('channel', True),
                        ('group', shape[2:] == (1, 1)),
                    ):
                        norm = BCN(
                            shape[1],
                            4,
                            channel_affine=affine,
                            estimate=estimate,
                        )
                        for tensor in (x, shifted, x.clone()):
                            norm(tensor.requires_grad_()).sum().backward()
                    if x[0].numel() > 1:
                        for tensor in (x, shifted, x.clone()):
                            standardize_weight(tensor).sum().backward()
    assert again >= {
        *('_tile_moments', '_forward', '_affine', '_whole_backward'),
        *('_tile_sums', '_input_coefficients', '_input_grad'),
        *('_standardize', '_pull_back'),
    }, again


def main(name, device='cpu', examples='30'):
    run(name, device, int(examples))
    check_layer(name, device)
    check_gradient_of_gradient(name, device)
    check_overflow(name, device)
    check_layout_of_what_was_saved(name, device)
    check_many_tiles(device)
    if device == 'cpu':
        check_launches()
    print('parity holds')


if __name__ == '__main__':
    main(*sys.argv[1:])
