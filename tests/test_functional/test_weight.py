import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import ConvWS, ConvWS1d
from wsbcn_mm.functional import standardize_weight


def definition(weight, eps=1e-5, eps_inside_sqrt=False):
    wide = weight.double().flatten(1)
    centered = wide - wide.mean(1, keepdim=True)
    if eps_inside_sqrt:
        divisor = (wide.var(1, keepdim=True) + eps).sqrt()
    else:
        divisor = wide.std(1, keepdim=True) + eps
    return (centered / divisor).view_as(weight)


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA GPU: none here'
)


@pytest.mark.parametrize(
    'device', ['cpu', pytest.param('cuda', marks=needs_cuda)]
)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 5)] * 4).filter(
        lambda s: s[1] * s[2] * s[3] > 1
    ),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([(0.0, 1.0), (0.0, 1e-3), (100.0, 0.1)]),
    st.sampled_from([(1e-5, False), (1e-5, True), (0.1, True), (0.0, True)]),
)
def test_parity_with_the_definition(
    device, shape, dtype, channels_last, size, form
):
    mean, std = size
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    weight = (weight * std + mean).to(dtype)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    wide = weight.detach().double().requires_grad_()
    grad = torch.randn(shape, device=device).to(dtype)
    result, expected = (
        standardize_weight(weight, *form),
        definition(wide, *form),
    )
    result.backward(grad)
    expected.backward(grad.double())
    tolerance = {torch.float64: 1e-9, torch.float32: 3e-4}.get(dtype, 2e-2)
    deviation = wide.detach().flatten(1).std(1).min()
    if mean / (deviation + 1e-9) > 1e4:
        return  # the weight itself has no digits left to compare
    assert result.dtype == weight.grad.dtype == dtype
    assert result.stride() == weight.stride()
    for actual, wanted in ((result, expected), (weight.grad, wide.grad)):
        error = (actual.double() - wanted).abs().max()
        assert error <= tolerance * (wanted.abs().max() + 1)


def test_a_filter_of_one_weight_is_refused():
    with pytest.raises(ValueError, match='at least two weights.*4, 1, 1, 1'):
        standardize_weight(torch.randn(4, 1, 1, 1))


@pytest.mark.parametrize('inside', [False, True])
def test_a_constant_filter_gives_zeros_and_a_finite_gradient(inside):
    weight = torch.full((2, 3, 3, 3), 0.5, requires_grad=True)
    standardize_weight(weight, eps_inside_sqrt=inside).sum().backward()
    assert standardize_weight(weight, eps_inside_sqrt=inside).eq(0).all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize('form', [(1e-5, False), (1e-5, True), (0.1, True)])
def test_a_compiler_gets_the_same_numbers(form):
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(weight)
    compiled = torch.compile(
        standardize_weight, backend='aot_eager', fullgraph=True
    )
    results = []
    for function in (compiled, definition):
        y = function(weight, *form)
        results.append((y, *torch.autograd.grad(y, weight, grad)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.fixture
def count(monkeypatch):
    """How often a weight was standardized."""
    calls = []
    original = standardize_weight.vjp

    def vjp(*args, **kwargs):
        calls.append('forward')
        return original(*args, **kwargs)

    monkeypatch.setattr(standardize_weight, 'vjp', vjp)
    return calls


def textbook(conv, x):
    weight = definition(conv.weight, conv.eps, conv.eps_inside_sqrt)
    return conv._conv_forward(x, weight.to(x.dtype), conv.bias)


def check(conv, x):
    """The convolution, with its gradient, is that of its present weight."""
    torch.testing.assert_close(
        conv(x).float(), textbook(conv, x), rtol=1e-4, atol=1e-4
    )


@pytest.fixture
def conv():
    return ConvWS(4, 6, 3, padding=1)


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 5)


def test_calls_of_a_step_share_one_weight_and_have_their_gradients(
    conv, x, count
):
    levels = [x, 2 * x[:1], x[..., 1:]]
    sum(conv(level).square().sum() for level in levels).backward()
    assert count == ['forward']
    got = conv.weight.grad
    loss = sum(textbook(conv, level).square().sum() for level in levels)
    (wanted,) = torch.autograd.grad(loss, conv.weight)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_nothing_is_kept_between_the_steps(conv, x):
    y = conv(x)
    _, shared = conv.__dict__['_shared_weight']
    assert shared() is not None
    y.sum().backward()
    del y
    assert shared() is None


def test_a_step_that_autograd_does_not_see_is_seen(conv, x):
    """Optimizers that write to ``.data``, with the last loss still there."""
    loss = conv(x).square().sum()
    loss.backward()
    conv.weight.data.add_(conv.weight.grad.sign())
    check(conv, x)
    assert loss is not None


def test_two_losses_go_backward_one_after_the_other(conv, x):
    losses = [conv(x).square().sum(), conv(2 * x).square().sum()]
    for loss in losses:
        loss.backward()
    total = textbook(conv, x).square() + textbook(conv, 2 * x).square()
    (wanted,) = torch.autograd.grad(total.sum(), conv.weight)
    torch.testing.assert_close(conv.weight.grad, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_activation_checkpointing(conv, x, use_reentrant):
    x.requires_grad_()
    y = checkpoint(conv, x, use_reentrant=use_reentrant)
    y = y + checkpoint(conv, 2 * x, use_reentrant=use_reentrant) + conv(x)
    y.square().sum().backward()
    z = 2 * textbook(conv, x) + textbook(conv, 2 * x)
    (wanted,) = torch.autograd.grad(z.square().sum(), conv.weight)
    torch.testing.assert_close(conv.weight.grad, wanted, rtol=1e-3, atol=2e-3)


def test_evaluation_computes_once(conv, x, count):
    conv.eval()
    for _ in range(3):
        with torch.no_grad():
            conv(x)
    with torch.inference_mode():
        conv(x)
    conv(x).sum().backward()  # an attack, say: with gradients
    assert count == ['forward']


def _edit(conv):
    with torch.no_grad():
        conv.weight.mul_(2).add_(torch.randn_like(conv.weight))


def _step(conv):
    conv.weight.grad = torch.randn_like(conv.weight)
    torch.optim.SGD(conv.parameters(), 1.0).step()


def _fused_step(conv):
    conv.weight.grad = torch.randn_like(conv.weight)
    torch.optim.AdamW(conv.parameters(), 1.0, fused=True).step()


def _load(conv):
    conv.load_state_dict(ConvWS(4, 6, 3).state_dict())


def _assign(conv):
    conv.load_state_dict(ConvWS(4, 6, 3).state_dict(), assign=True)


def _replace(conv):
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def _round_trip(conv):
    with torch.no_grad():
        conv.weight.mul_(1.2345)
    conv.half()
    conv.float()


def _swap_data(conv):
    conv.weight.data = torch.randn_like(conv.weight)


def _ema(conv):
    """As MMEngine's EMAHook before a validation."""
    conv.weight.data.copy_(torch.randn_like(conv.weight))
    conv.eval()


def _eps(conv):
    conv.eps = 0.5


def _form(conv):
    conv.eps, conv.eps_inside_sqrt = 0.1, not conv.eps_inside_sqrt


def _inplace_init(conv):
    nn.init.normal_(conv.weight)


@pytest.mark.parametrize(
    'change',
    [
        _edit, _step, _fused_step, _load, _assign, _replace, _round_trip,
        _swap_data, _ema, _eps, _form, _inplace_init,
    ],
)  # fmt: skip
@pytest.mark.parametrize('grad', [False, True])
def test_evaluation_is_never_stale(conv, x, change, grad):
    conv.eval()
    with torch.set_grad_enabled(grad):
        check(conv, x)
        for _ in range(2):
            change(conv)
            check(conv, x)


@pytest.mark.parametrize('grad', [False, True])
def test_a_momentum_encoder_in_training_is_never_stale(conv, x, grad):
    """Edited by ``.data``, as MMEngine's averaged models are."""
    conv.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            check(conv, x)
            conv.weight.data.copy_(torch.randn_like(conv.weight))


@pytest.mark.parametrize('training', [False, True])
def test_copies_carry_no_weight_but_their_own(conv, x, training):
    conv.train(training)
    y = conv(x)
    assert '_shared_weight' in conv.__dict__
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(conv),
        copy.copy(conv),
        pickle.loads(pickle.dumps(conv)),
        torch.load(buffer, weights_only=False),
    ):
        assert '_shared_weight' not in other.__dict__
        torch.testing.assert_close(other(x), y)
        with torch.no_grad():
            other.weight.normal_()
        check(other, x)
    assert list(conv.state_dict()) == ['weight', 'bias']


def test_inference_mode_then_training(conv, x):
    conv.eval()
    with torch.inference_mode():
        conv(x)
    conv(x).sum().backward()
    with torch.inference_mode():
        made_there = ConvWS(4, 6, 3).eval()
        check(made_there, x)
        made_there.weight.add_(torch.randn_like(made_there.weight))
        check(made_there, x)


def test_autocast_casts_once_and_keeps_both(conv, x):
    conv.eval()
    check(conv, x)
    with torch.autocast('cpu', torch.bfloat16):
        assert conv.standardized_weight().dtype == torch.bfloat16
        conv(x).float().square().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    check(conv, x)


@pytest.mark.parametrize('form', [(1e-5, False), (0.1, True)])
def test_double_backward(form):
    conv = ConvWS1d(
        *(3, 2, 3), eps=form[0], eps_inside_sqrt=form[1], dtype=torch.float64
    )
    x = torch.randn(1, 3, 4, dtype=torch.float64)

    def second(function):
        (grad,) = torch.autograd.grad(
            function().square().sum(), conv.weight, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), conv.weight)[0]

    torch.testing.assert_close(
        second(lambda: conv(x)),
        second(
            lambda: nn.functional.conv1d(
                x, definition(conv.weight, *form), conv.bias
            )
        ),
    )


@pytest.mark.parametrize('inside', [False, True])
def test_functional_call_and_transforms(conv, x, inside):
    conv.eps, conv.eps_inside_sqrt = 0.1, inside
    other = torch.randn_like(conv.weight)

    def loss(weight, x):
        parameters = {'weight': weight}
        return torch.func.functional_call(conv, parameters, x).square().sum()

    def wanted(weight, x):
        y = nn.functional.conv2d(
            x, definition(weight, 0.1, inside).float(), conv.bias, padding=1
        )
        return y.square().sum()

    check(conv, x)
    for weight in (other, conv.weight.detach()):
        for f in (loss, wanted):
            assert torch.isfinite(f(weight, x))
        torch.testing.assert_close(
            torch.func.grad(loss)(weight, x),
            torch.func.grad(wanted)(weight, x),
            rtol=1e-3,
            atol=1e-3,
        )
        torch.testing.assert_close(
            torch.func.vmap(torch.func.grad(loss), (None, 0))(
                weight, x[:, None]
            ),
            torch.func.vmap(torch.func.grad(wanted), (None, 0))(
                weight, x[:, None]
            ),
            rtol=1e-3,
            atol=1e-3,
        )
    check(conv, x)


def _train(wrapper):
    """Losses and outputs of a few steps, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(
        ConvWS(3, 4, 3), nn.ReLU(), ConvWS(4, 4, 3, padding=1)
    )
    if wrapper == 'DDP':
        model = nn.parallel.DistributedDataParallel(model)
    elif wrapper == 'FSDP':
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh('cpu', (torch.distributed.get_world_size(),))
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, numbers = torch.randn(2, 3, 8, 8), []
    for _ in range(3):
        model.train()
        loss = (model(x) + model(x[..., 1:]).mean()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            outputs = [model(x).square().mean().item() for _ in range(2)]
        numbers += [loss.item(), *outputs]
    return numbers


@pytest.mark.parametrize('wrapper', ['DDP', 'FSDP'])
def test_distributed_training_is_that_of_one_process(processes, wrapper):
    if wrapper == 'FSDP':
        if TorchVersion(torch.__version__) < '2.7':
            pytest.skip('it needs a GPU before torch 2.7')
    expected = pytest.approx(_train(None), rel=1e-4)
    for numbers in processes.run(_train, [wrapper, wrapper]):
        assert numbers == expected
