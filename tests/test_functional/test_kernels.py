import os
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import kernel_parity
import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BCN
from wsbcn_mm.functional import kernels
from wsbcn_mm.functional.kernels import compiled
from wsbcn_mm.functional.kernels.layout import dense

try:
    import triton
except ImportError:
    TRITON = TorchVersion('0')
else:
    TRITON = TorchVersion(triton.__version__)
needs_triton = pytest.mark.skipif(TRITON == '0', reason='needs triton')
# The kernels themselves run with older ones: is_asked_once says so.
needs_new_triton = pytest.mark.skipif(
    TRITON < '3.3', reason='needs the compiler and interpreter of Triton 3.3'
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA GPU: none here'
)


@pytest.mark.parametrize('name', ['plain', 'cpu', 'compiled'])
def test_parity_on_cpu(name):
    kernel_parity.run(name, 'cpu', examples=60)


def test_a_layer_on_compiled_kernels():
    kernel_parity.check_layer('compiled')


def test_an_overflow_poisons_no_estimate_of_compiled_kernels():
    kernel_parity.check_overflow('compiled')


@pytest.mark.parametrize('shape', [(2, 3, 200, 304), (37, 50, 7, 7)])
def test_compiled_kernels_say_the_same_with_any_number_of_threads(shape):
    torch.manual_seed(0)
    x, grad = torch.randn(shape), torch.randn(shape)
    small = torch.randn(4, *shape[:2])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    *compiled.moments(x),
                    compiled.affine(x, *small[:3]),
                    *compiled.reduce(grad, x, small[0]),
                    compiled.input_grad(grad, x, *small),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_compiled_kernels_say_what_is_not_finite():
    x = torch.randn(2, 3, 5, 50)
    x[0, 1, 2, 3] = torch.inf
    x[1, 2, 3, 4] = torch.nan
    mean, var = compiled.moments(x)
    bad = torch.tensor([[False, True, False], [False, False, True]])
    assert torch.equal(~mean.isfinite(), bad)
    assert torch.equal(var.isnan(), bad)


def test_kernels_compiled_from_another_source_are_not_used(
    tmp_path, monkeypatch
):
    shutil.copy(compiled._library._name, tmp_path)
    monkeypatch.setattr(compiled, '_SOURCE', tmp_path / 'compiled.cpp')
    compiled._SOURCE.write_text('// edited')
    with pytest.raises(ImportError, match='install the package again'):
        compiled._load()


def test_those_of_another_python_may_lie_beside(tmp_path, monkeypatch):
    ours, source = Path(compiled._library._name), compiled._SOURCE
    shutil.copy(source, tmp_path)
    shutil.copy(ours, tmp_path / '_compiled.python2.so')
    checksum = zlib.crc32(source.read_bytes()).to_bytes(4, sys.byteorder)
    stale = ours.read_bytes().replace(checksum, bytes(4))
    (tmp_path / '_compiled.python1.so').write_bytes(stale)
    (tmp_path / '_compiled.python0.so').write_text('of another machine')
    monkeypatch.setattr(compiled, '_SOURCE', tmp_path / source.name)
    assert compiled._load()._name.endswith('python2.so')


@pytest.mark.parametrize('negated', [(True, False), (False, True)])
def test_views_that_torch_negates(negated):
    """Their memory has the other sign."""
    x, grad = torch.randn(2, 2, 4, 3, 3)
    given = [
        torch._neg_view(-t) if n else t for t, n in zip((x, grad), negated)
    ]
    kernel_parity.check(compiled, *given)
    assert not any(dense(t).is_neg() for t in given)
    results = []
    for pair in ((x, grad), given):
        leaf = pair[0].detach().requires_grad_()
        y = BCN(4, 2)(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, pair[1])))
    torch.testing.assert_close(*results)


@needs_new_triton
def test_parity_of_triton_kernels_in_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip('they run on the GPU itself here')
    interpret(kernel_parity.__file__, 'fused')


@needs_triton
def test_triton_is_asked_once_for_each_kind_of_launch():
    python('-c', 'import kernel_parity as k; k.check_asked_once(90)')
    python('-c', 'import kernel_parity as k; k.check_compiled(90)')


@needs_triton
def test_launches_are_of_one_kind_of_tensors():
    """They look at nothing but addresses."""
    from wsbcn_mm.functional.kernels.launch import planned

    plans = planned(lambda *kind: kind)
    x = torch.zeros(2, 4, 3, 3)
    weight = torch.zeros(4)
    plan = plans(x, weight, settings=(0.5,))
    assert plan == ((2, 4, 3, 3), torch.float32, True, 0.5)
    assert plans(x.clone(), weight.clone(), settings=(0.5,)) is plan
    for other in (
        plans(x, weight.half(), settings=(0.5,)),
        plans(x.half(), weight, settings=(0.5,)),
        plans(x, weight, weight, settings=(0.5,)),
        plans(x, weight, settings=(0.25,)),
        plans(x[:1], weight, settings=(0.5,)),
        plans(
            x.contiguous(memory_format=torch.channels_last),
            weight,
            settings=(0.5,),
        ),
        plans(x.to('meta'), weight.to('meta'), settings=(0.5,)),
    ):
        assert other is not plan
    with pytest.raises(RuntimeError, match='input on cpu and others on meta'):
        plans(x, weight.to('meta'))


def interpret(*arguments):
    """Run Python with Triton's interpreter."""
    python(*arguments, TRITON_INTERPRET='1')


def python(*arguments, **environment):
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        timeout=300,
    )


def registers(ptx, capability):
    """How many a thread takes, by the assembler that Triton brings.

    And how many bytes it puts aside for want of them.
    """
    from triton.backends import nvidia

    assembler = Path(nvidia.__file__).parent / 'bin' / 'ptxas'
    if not assembler.exists():
        return 0, 0
    target = f'--gpu-name=sm_{capability}' + 'a' * (capability >= 90)
    said = subprocess.run(
        [assembler, '-v', target, '-', '-o', os.devnull],
        input=ptx,
        capture_output=True,
        check=True,
        text=True,
    ).stderr
    return tuple(
        int(re.search(what, said)[1])
        for what in (r'Used (\d+) registers', r'(\d+) bytes spill stores')
    )


@needs_new_triton
@pytest.mark.parametrize('activations', ['fp32', 'fp16', 'bf16', 'fp64'])
@pytest.mark.parametrize('capability', [80, 90])
def test_triton_kernels_compile_without_a_gpu(capability, activations):
    """And load 16 bytes at a time in both layouts."""
    from triton.backends import compiler
    from triton.compiler import ASTSource, compile

    from wsbcn_mm.functional.kernels import (
        fused,
        fused_coefficients,
        fused_weight,
    )

    statistics = 'fp64' if activations == 'fp64' else 'fp32'
    wide = 'ld.global.v2.b64' if statistics == 'fp64' else 'ld.global.v4.b32'
    usual = 168 if statistics == 'fp64' else 128

    def check(
        kernel, large, options=None, is_wide=True, most=usual, **constants
    ):
        signature, aligned = {}, {}
        for i, parameter in enumerate(kernel.jit.params):
            name = parameter.name
            if name in constants:
                signature[name] = 'constexpr'
                continue
            if parameter.do_not_specialize:
                signature[name] = 'fp64' if name == 'momentum' else 'i32'
                continue
            dtype = activations if name in large else statistics
            is_count = name in ('count', 'forwards')
            signature[name] = '*i64' if is_count else f'*{dtype}'
            aligned[(i,)] = [['tt.divisibility', 16]]
        source = ASTSource(kernel.jit, signature, constants, aligned)
        target = compiler.GPUTarget('cuda', capability, 32)
        ptx = compile(source, target=target, options=options).asm['ptx']
        assert not is_wide or wide in ptx
        taken, spilled = registers(ptx, capability)
        # A word or two it may trade, of its own accord, for more at a time.
        assert taken <= most and spilled <= (8 if taken < most else 0)
        return ptx

    for last, channels, positions in [(False, 1, 4096), (True, 64, 64)]:
        for name in ('_tile_moments', '_affine', '_tile_sums', '_input_grad'):
            counts = dict(COUNTS=True) if name == '_tile_moments' else {}
            check(
                getattr(fused, name),
                ('x', 'grad', 'result'),
                **counts,
                CHANNEL_UNIT=16,
                UNIT=8,
                CHANNELS_LAST=last,
                CHANNELS=channels,
                POSITIONS=positions,
            )
    check(
        fused_coefficients._join_moments,
        (),
        is_wide=False,
        POSITIONS=64,  # of channels_last, which has the most tiles
        AT_ONCE=fused_coefficients._AT_ONCE,
    )
    for per_channel in (False, True):
        group = dict(EPS=1e-5, PER_CHANNEL=per_channel, SIZE=32)
        check(fused_coefficients._backward, (), is_wide=False, **group)
        for samples, size, tiles in [(16, 32, 1), (4, 8, 16), (1, 32, 16)]:
            for estimate in (True, False):
                check(
                    fused_coefficients._input_coefficients,
                    (),
                    is_wide=False,
                    most=255,  # a program for each group: few
                    ESTIMATE=estimate,
                    SAMPLES=samples,
                    TILES=tiles,
                    **{**group, 'SIZE': size},
                )
        for last in (False, True):
            check(
                fused._whole_backward,
                ('x', 'grad', 'result'),
                dict(num_warps=fused._warps(fused._ELEMENTS)),
                is_wide=False,
                UNIT=4,
                CHANNELS_LAST=last,
                POSITIONS=64 if statistics == 'fp64' else 128,
                **group,
            )
        for samples, size, tiles in [(32, 32, 1), (8, 8, 16), (1, 64, 16)]:
            for estimate in (True, False):
                ptx = check(
                    fused_coefficients._forward,
                    (),
                    is_wide=False,
                    most=255,
                    LEARNS=True,
                    ESTIMATE=estimate,
                    AVERAGING=False,
                    ANNEALING=per_channel,
                    POSITIONS=4096,
                    SAMPLES=samples,
                    TILES=tiles,
                    **{**group, 'SIZE': size},
                )
                # No thread moves estimates that another has yet to look at.
                assert 0 < ptx.index('bar.sync') < ptx.index('st.global')
    for elements in (256, 4096):
        for name in ('_standardize', '_pull_back'):
            check(
                getattr(fused_weight, name),
                ('grad', 'weight', 'result'),
                dict(num_warps=max(elements // 512, 1)),
                UNIT=8,
                ELEMENTS=elements,
                VAR_EPS=0.0,
                STD_EPS=1e-5,
                IS_DOUBLE=statistics == 'fp64',
            )


@needs_new_triton
def test_triton_launches_where_the_tensors_are(monkeypatch):
    from wsbcn_mm.functional.kernels import launch

    devices = []

    @contextmanager
    def device_of(tensor):
        devices.append(tensor.device.type)
        yield
        devices.append('before')

    monkeypatch.setattr(torch.cuda, 'device_of', device_of)
    launched = launch.on_its_device(lambda x, y: devices.append(y))
    launched(torch.empty(1, device='meta'), y='launched')
    assert devices == ['meta', 'launched', 'before']
    interpret('-c', 'import kernel_parity as k; k.check_devices()')


@needs_new_triton
def test_triton_compiles_nothing_anew_for_another_update_rate():
    from wsbcn_mm.functional.kernels import fused_coefficients

    parameters = fused_coefficients._forward.jit.params
    rate = {p.name: p for p in parameters}['momentum']
    assert rate.do_not_specialize and rate.annotation_type == 'fp64'


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason='needs two GPUs: fewer here'
)
def test_parity_on_another_gpu_than_the_current_one():
    kernel_parity.run('fused', 'cuda:1', examples=20)


@needs_cuda
@pytest.mark.parametrize('name', ['plain', 'cuda', 'fused'])
def test_parity_on_cuda(name):
    kernel_parity.run(name, 'cuda', examples=20)


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
    assert kernels.select(x) is compiled
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
    assert kernels.select(x) is compiled


@pytest.mark.parametrize('backend', [kernels.cpu, compiled])
@pytest.mark.parametrize('mean', [0, 1, 5, 30, 1e3])
def test_moments_of_many_positions(mean, backend):
    """Whichever way the CPU takes for a mean that far from zero."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 200, 304) * torch.tensor([1, 2, 3]).view(3, 1, 1)
    x += mean
    wide_mean, wide_var = kernels.plain.moments(x.double())
    got_mean, got_var = backend.moments(x)
    std = wide_var.sqrt()
    assert ((got_mean - wide_mean).abs() < 2e-6 * (std + mean)).all()
    assert ((got_var - wide_var).abs() < 2e-5 * wide_var).all()


def test_pieces_cover_activations_larger_than_one(monkeypatch):
    monkeypatch.setattr(kernels.cpu, '_PIECE', 16)
    kernel_parity.run('cpu', 'cpu', examples=60)


@pytest.fixture
def backends(monkeypatch):
    """Choose anew, among backends that work on this device or do not."""
    modules = {}
    monkeypatch.setattr(
        kernels,
        'import_module',
        lambda name, package: modules[name.removeprefix('.')](),
    )
    monkeypatch.setitem(kernels._BACKENDS, 'cpu', modules.keys())
    monkeypatch.setattr(kernels, '_NEEDS_NO_CHECK', ())
    monkeypatch.setattr(kernels, '_FOUND', {})
    return modules


def refused(tensor):
    raise RuntimeError('nothing of a check is to be saved here')


@pytest.mark.parametrize(
    'around',
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.device, 'meta'),
        partial(torch.autocast, 'cpu', torch.bfloat16),
        partial(torch.autograd.graph.saved_tensors_hooks, refused, refused),
        partial(torch.autograd.graph.disable_saved_tensors_hooks, 'refused'),
    ],
)
def test_a_backend_is_checked_whatever_is_around_its_first_use(
    backends, around
):
    backends['compiled'] = lambda: compiled
    x = torch.randn(1, 2, 3)
    with around(), warnings.catch_warnings():
        warnings.simplefilter('error')
        assert kernels.select(x) is compiled


def test_a_first_use_may_be_one_that_is_done_again(backends):
    """Activation checkpointing counts what is saved for a backward pass."""
    backends['compiled'] = lambda: compiled
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    checkpoint(BCN(4, 2), x, use_reentrant=False).sum().backward()
    assert x.grad.isfinite().all()


def test_a_backend_that_does_not_load_is_replaced(backends):
    def no_triton():
        raise ImportError('No module named triton')

    backends['fused'] = no_triton
    backends['cuda'] = lambda: kernels.cpu
    x = torch.randn(1, 2, 3)
    with pytest.warns(UserWarning, match="'fused'.*No module named triton"):
        with torch.device('meta'):  # of what is made there, not of the check
            assert kernels.select(x) is kernels.cpu
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter('error')
        assert kernels.select(x) is kernels.cpu


@pytest.mark.parametrize(
    'function', ['moments', 'affine', 'reduce', 'input_grad', 'batch_channel']
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_backend_that_computes_something_else_is_not_used(
    backends, function, dtype
):
    def off_by_little(*args, **kwargs):
        result = getattr(kernels.cpu, function)(*args, **kwargs)
        if function == 'batch_channel':
            scale, shift, pull_back = result
            return scale, shift * 1.01, pull_back
        if isinstance(result, torch.Tensor):
            return result * 1.1
        return result[0], result[1] * 1.01

    broken = SimpleNamespace(**vars(kernels.cpu))
    setattr(broken, function, off_by_little)
    backends['fused'] = lambda: broken
    x = torch.randn(1, 2, 3).to(dtype)
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match='times what rounding allows'):
        assert kernels.select(x) is kernels.plain
    assert (torch.random.get_rng_state() == state).all()


def test_kernels_can_be_disabled(backends, monkeypatch):
    backends['compiled'] = backends['fused'] = pytest.fail
    backends['cpu'] = lambda: kernels.cpu
    monkeypatch.setenv('WSBCN_MM_DISABLE_KERNELS', 'compiled, fused')
    assert kernels.select(torch.randn(1, 2, 3)) is kernels.cpu


def test_unknown_kernels_to_disable_are_named(backends, monkeypatch):
    backends['cpu'] = lambda: kernels.cpu
    monkeypatch.setenv('WSBCN_MM_DISABLE_KERNELS', 'triton')
    with pytest.raises(ValueError, match='=triton: expected .* cpu, cuda, f'):
        kernels.select(torch.randn(1, 2, 3))


@pytest.fixture
def gpu(backends, monkeypatch):
    """A GPU's backends, tried on the processor, and its state."""
    state = SimpleNamespace(is_capturing=False, is_lost=False)

    def synchronize(device):
        if state.is_lost:
            raise RuntimeError('CUDA error: an illegal memory access')

    check = kernels.check_first_use
    monkeypatch.setattr(
        kernels,
        'check_first_use',
        lambda module, device, dtype: check(
            module, torch.device('cpu'), dtype
        ),
    )
    monkeypatch.setitem(kernels._BACKENDS, 'cuda', ['fused', 'cuda'])
    monkeypatch.setattr(torch.cuda, 'synchronize', synchronize)
    monkeypatch.setattr(
        torch.cuda,
        'is_current_stream_capturing',
        lambda: state.is_capturing,
    )
    return state


def find_on_gpu():
    return kernels._find(torch.device('cuda', 0), torch.float32)


def test_a_first_use_in_a_capture_takes_the_definition_for_now(backends, gpu):
    backends['fused'] = pytest.fail
    gpu.is_capturing = True
    with pytest.warns(UserWarning, match='in the capture of a CUDA graph'):
        assert find_on_gpu() is kernels.plain
    backends['fused'] = lambda: compiled
    gpu.is_capturing = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find_on_gpu() is compiled


def test_a_fault_that_cuda_does_not_recover_from_is_raised(backends, gpu):
    """No other kernels would run, either."""
    broken = SimpleNamespace(**vars(compiled))

    def moments(x):
        gpu.is_lost = is_lost
        raise RuntimeError('CUDA error: an illegal memory access')

    broken.moments = moments
    backends['fused'] = lambda: broken
    backends['cuda'] = lambda: kernels.cpu
    is_lost = False
    with pytest.warns(UserWarning, match="'fused' kernels do not work here"):
        assert find_on_gpu() is kernels.cpu
    is_lost = True
    with pytest.raises(
        RuntimeError, match='WSBCN_MM_DISABLE_KERNELS=fused, .* illegal'
    ):
        find_on_gpu()


def test_kernels_that_were_not_compiled_are_not_missed(backends, monkeypatch):
    monkeypatch.setattr(compiled, 'is_built', False)
    backends['compiled'] = lambda: compiled
    backends['cpu'] = lambda: kernels.cpu
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert kernels.select(torch.randn(1, 2, 3)) is kernels.cpu


@pytest.mark.parametrize('index', range(5))
def test_a_wrong_backward_is_not_used(backends, index):
    def off_by_little(*args, **kwargs):
        grads = list(compiled.batch_channel_backward(*args, **kwargs))
        grads[index] = grads[index] * 1.01 + 0.01
        return grads

    broken = SimpleNamespace(**vars(compiled))
    broken.batch_channel_backward = off_by_little
    backends['compiled'] = lambda: broken
    with pytest.warns(UserWarning, match='grad of .* off by'):
        assert kernels.select(torch.randn(1, 2, 3)) is kernels.plain


def test_out_of_memory_is_no_reason_for_slower_kernels(backends):
    def full():
        raise torch.cuda.OutOfMemoryError('full')

    backends['fused'] = full
    with pytest.raises(torch.cuda.OutOfMemoryError):
        kernels.select(torch.randn(1, 2, 3))
