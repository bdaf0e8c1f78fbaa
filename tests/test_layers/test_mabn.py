import copy
import pickle

import mmcv.cnn
import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import MABN, set_loss_scale

NORM_CFG = dict(type='MABN', batch_size=2, simulated_batch_size=8)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance
    )


def authors_state(v):
    """The state dict of the authors' layer, shapes and all."""
    state = dict(weight=v['weight'], bias=v['bias'])
    for name in ('running_var', 'buffer_x2', 'buffer_gz'):
        state[name] = v[f'init_{name}']
    state['iters'] = v['init_iters'].view(1)
    return state


def from_vectors(v):
    norm = MABN(
        v['weight'].numel(),
        v.number('batch_size'),
        v.number('simulated_batch_size'),
        eps=v.number('eps'),
        momentum=v.number('momentum'),
        warmup_iters=v.number('warmup_iters'),
        dtype=torch.float64,
    )
    norm.load_state_dict(authors_state(v))
    return norm


class Definition:
    """One training step at a time, as the paper's formulas say."""

    def __init__(self, norm):
        state = copy.deepcopy(norm.state_dict())
        self.weight, self.bias = state['weight'], state['bias']
        self.running_var = state['running_var']
        self.squares = list(state['buffer_x2'])
        self.psis = list(state['buffer_gz'])
        self.iters = state['num_batches_tracked'].item()
        self.norm = norm

    def step(self, x, grad):
        y, backward = self.forward(x)
        return (y, *backward(grad))

    def forward(self, x):
        norm, size = self.norm, len(self.squares)
        self.iters += 1
        slot = self.iters % size
        dims = (0, *range(2, x.dim()))
        column = (1, -1, *(1 for _ in x.shape[2:]))
        square = x.square().mean(dims)
        self.squares[slot] = square
        averaging = self.iters > size and self.iters >= norm.warmup_iters
        if averaging:
            square = sum(self.squares) / size
        std = (square + norm.eps).sqrt()
        ratio = torch.ones_like(std)
        if self.iters > max(1000, norm.warmup_iters):
            ratio = std / (self.running_var + norm.eps).sqrt()
            ratio = ratio.clamp(1 / 5, 5)
        self.running_var = (
            norm.momentum * self.running_var + (1 - norm.momentum) * square
        )
        z = x / std.view(column)
        y = (self.weight * ratio).view(column) * z + self.bias.view(column)

        def backward(grad):
            g = grad * (self.weight * ratio).view(column)
            psi = (g * z).mean(dims)
            self.psis[slot] = psi
            if averaging:
                psi = sum(self.psis) / size
            grad_x = (g - z * psi.view(column)) / std.view(column)
            grad_weight = (grad * z * ratio.view(column)).sum(dims)
            return grad_x, grad_weight, grad.sum(dims)

        return y, backward


def step(norm, x, grad):
    x = x.clone().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(grad)
    return y, x.grad, norm.weight.grad, norm.bias.grad


@pytest.mark.parametrize('case', ['warmup', 'buffered', 'clipped'])
def test_authors_vectors(vectors, case):
    v = vectors('mabn', case)
    norm = from_vectors(v)
    definition = Definition(norm)
    steps = 0
    for key in v.steps():
        got = step(norm, v[key + 'x'], v[key + 'grad_y'])
        expected = [v[key + k] for k in ('y', 'grad_x')]
        expected += [v[f'{key}grad_{k}'] for k in ('weight', 'bias')]
        for a, b in zip(got, expected):
            close(a, b)
        close(norm.running_var, v[key + 'running_var'])
        # The files hold no buffers after a step, so they come from the
        # definition, which agrees with all that the files do hold.
        for a, b in zip(
            definition.step(v[key + 'x'], v[key + 'grad_y']), expected
        ):
            close(a, b)
        close(norm.buffer_x2, torch.stack(definition.squares))
        close(norm.buffer_gz, torch.stack(definition.psis))
        steps += 1
    assert steps >= 3
    assert norm.num_batches_tracked == v.number('init_iters') + steps
    close(norm.eval()(v['eval_x']), v['eval_y'])


@pytest.mark.parametrize('size', [(7,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize('counts', [[2, 2, 2, 2], [2, 5, 1, 3]])
def test_definition_in_any_dimension_and_batch_size(size, counts):
    norm = MABN(6, 2, 4, warmup_iters=2, momentum=0.5, dtype=torch.float64)
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.num_batches_tracked.fill_(998)  # from here through the clipping
    definition = Definition(norm)
    for count in counts:
        x = torch.randn(count, 6, *size, dtype=torch.double) + 1
        grad = torch.randn_like(x)
        for a, b in zip(step(norm, x, grad), definition.step(x, grad)):
            close(a, b)
        close(norm.running_var, definition.running_var)


def test_authors_state_dict_in_a_model(vectors):
    v = vectors('mabn', 'buffered')

    class Block(BaseModule):
        def __init__(self):
            super().__init__()
            self.mabn1 = from_vectors(v)

    state = {f'mabn1.{k}': t for k, t in authors_state(v).items()}
    block = Block()
    block.mabn1.reset_parameters()
    block.load_state_dict(state)
    x = v['step0_x']
    close(block.mabn1(x), v['step0_y'])
    block.load_state_dict(block.state_dict())


def test_batch_norm_checkpoint_keeps_its_function():
    bn = nn.BatchNorm2d(6).double()
    bn(torch.randn(8, 6, 4, 4).double() * 3 + 2)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    norm = MABN(6, 1, 4, dtype=torch.float64)
    norm.buffer_x2.fill_(7)
    norm.load_state_dict(bn.state_dict())
    x = torch.randn(2, 6, 4, 4).double()
    close(norm.eval()(x), bn.eval()(x), 1e-7)
    assert norm.num_batches_tracked == 0 and not norm.buffer_x2.any()


def test_inference_affine_is_evaluation(vectors):
    norm = from_vectors(vectors('mabn', 'clipped')).eval()
    scale, shift = norm.inference_affine()
    x = torch.randn(2, 6, 4, 4).double()
    close(norm(x), x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))


def test_norm_eval_freezes_everything():
    norm = MABN(6, 1, 2)
    norm(torch.randn(2, 6, 4, 4))
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(2, 6, 4, 4)
    y = norm(x)
    y.sum().backward()
    for key, value in norm.state_dict().items():
        assert (value == before[key]).all()
    assert (y == norm.eval()(x)).all()


def test_a_shared_layer_has_the_gradients_of_its_own_calls():
    norm = MABN(6, 1, 3, warmup_iters=0, dtype=torch.float64)
    norm.num_batches_tracked.fill_(2000)
    definition = Definition(norm)
    xs = [torch.randn(1, 6, s, s).double().requires_grad_() for s in (8, 4, 2)]
    grads = [torch.randn_like(x) for x in xs]
    outputs = [norm(x) for x in xs]
    torch.autograd.backward(outputs, grads)
    expected, backwards = zip(*(definition.forward(x.detach()) for x in xs))
    grad_weight = 0
    # Autograd starts with the last call.
    for backward, x, grad in list(zip(backwards, xs, grads))[::-1]:
        grad_x, *parameters = backward(grad)
        close(x.grad, grad_x)
        grad_weight = grad_weight + parameters[0]
    close(norm.weight.grad, grad_weight)
    for a, b in zip(outputs, expected):
        close(a, b)
    close(norm.buffer_x2, torch.stack(definition.squares))
    close(norm.buffer_gz, torch.stack(definition.psis))
    close(norm.running_var, definition.running_var)


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('calls', [1, 3])
def test_activation_checkpointing(use_reentrant, calls):
    norm = MABN(6, 1, 2, warmup_iters=0, dtype=torch.float64)
    norm.num_batches_tracked.fill_(2000)
    norm.buffer_x2.uniform_(0.5, 2)
    norm.buffer_gz.uniform_(-1, 1)
    other = copy.deepcopy(norm)
    xs = [
        torch.randn(1, 6, 4, 4).double().mul(3).requires_grad_()
        for _ in range(calls)
    ]
    results = []
    for layer, wrapped in (
        (norm, lambda x: checkpoint(norm, x, use_reentrant=use_reentrant)),
        (other, other),
    ):
        ys = [wrapped(x) for x in xs]
        inputs = [*xs, *layer.parameters()]
        for x in inputs:
            x.grad = None
        sum((y * y).sum() for y in ys).backward()
        results.append(([x.grad for x in inputs], layer.state_dict()))
    for a, b in zip(*(grads for grads, _ in results)):
        close(a, b)
    for key in results[0][1]:
        close(results[0][1][key], results[1][1][key])


def calls_and_backward(norm, xs):
    """Several calls before a backward pass, which does them again."""
    ys = [checkpoint(norm, x, use_reentrant=False) for x in xs]
    sum(y.float().square().sum() for y in ys).backward()
    return [x.grad for x in xs]


def test_more_calls_than_are_remembered_are_refused_to_be_done_again():
    norm = MABN(6, 1, 2)
    xs = [torch.randn(1, 6, 4, 4).requires_grad_() for _ in range(9)]
    with pytest.raises(RuntimeError, match=r'MABN\(6\).*none of the last 8'):
        calls_and_backward(norm, xs)
    calls_and_backward(norm, xs[:8])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_call_done_again_may_be_rounded_otherwise(dtype):
    """As by another algorithm of the convolution before."""
    norm, passes = MABN(6, 1, 2), []

    def rounded(x):
        passes.append(len(passes))
        error = torch.finfo(dtype).eps * passes[-1]  # all of the same sign
        return norm((x * (1 + error)).to(dtype))

    x = torch.randn(1, 6, 1, 1).requires_grad_()
    checkpoint(rounded, x, use_reentrant=False).float().sum().backward()
    assert len(passes) > 1 and x.grad.isfinite().all()


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_a_call_is_found_behind_one_that_overflowed(value):
    norm = MABN(6, 1, 2, warmup_iters=0)
    for _ in range(4):
        norm(torch.randn(1, 6, 4, 4)).square().sum().backward()
    other = copy.deepcopy(norm)
    xs = [torch.randn(1, 6, 4, 4).requires_grad_() for _ in range(2)]
    bad = torch.full_like(xs[0], value).requires_grad_()
    got = calls_and_backward(norm, [*xs, bad])
    for x in xs:
        x.grad = None
    sum(other(x).square().sum() for x in (*xs, bad)).backward()
    for x, grad in zip(xs, got):
        close(grad, x.grad, 1e-5)


def test_zero_rois():
    norm = MABN(6, 1, 2)
    before = copy.deepcopy(norm.state_dict())
    x = torch.zeros(0, 6, 7, 7, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    for key, value in norm.state_dict().items():
        assert (value == before[key]).all()
    for parameter in norm.parameters():
        assert not parameter.grad.any()
    assert norm.eval()(x).shape == x.shape


@pytest.mark.parametrize('value', [float('inf'), float('nan'), 65504.0])
def test_an_overflow_does_not_poison_the_averages(value):
    norm = MABN(4, 1, 2, warmup_iters=0)
    for _ in range(4):
        norm(torch.randn(1, 4, 3, 3)).square().sum().backward()
    x = torch.randn(1, 4, 3, 3, dtype=torch.half)
    x[0, 1] = value
    before = copy.deepcopy(norm.state_dict())
    norm(x.requires_grad_()).sum().backward()
    norm(torch.randn(1, 4, 3, 3)).mul(value).sum().backward()
    for name in ('running_var', 'buffer_x2', 'buffer_gz'):
        assert getattr(norm, name).isfinite().all(), name
    assert (norm.running_var[0] != before['running_var'][0]).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
def test_half_in_half_out_with_float32_statistics(dtype, training):
    norm = MABN(8, 2, 2, warmup_iters=1).train(training)
    norm.running_var.fill_(9e4)
    # Squares are beyond float16, and all but the output is in float32.
    x = (torch.randn(2, 8, 6, 6) * 300).to(dtype).requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and y.isfinite().all()
    expected = copy.deepcopy(norm).double()
    expected.running_var.fill_(9e4)
    close(y.double(), expected(x.detach().double()), 2e-2)
    cast = MABN(8, 2, 2).to(dtype).train(training)
    assert cast(x).dtype == dtype


def test_autocast_keeps_half():
    with torch.autocast('cpu', torch.bfloat16):
        x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
        for training in (True, False):
            assert MABN(8, 1, 2).train(training)(x).dtype == torch.bfloat16


@pytest.mark.parametrize('training', [True, False])
def test_in_place_relu_and_channels_last(training):
    norm = MABN(8, 1, 2).train(training)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    y = torch.relu_(norm(x.requires_grad_()))
    y.sum().backward()
    for t in (y, x.grad):
        assert t.is_contiguous(memory_format=torch.channels_last)


def test_one_pixel():
    norm = MABN(8, 1, 2)
    x = torch.randn(1, 8, 1, 1, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.isfinite().all()


def test_compiles_without_graph_break():
    norm = MABN(8, 1, 2, warmup_iters=0)
    norm.num_batches_tracked.fill_(2000)
    norm.buffer_gz.normal_()
    other = copy.deepcopy(norm)
    compiled = torch.compile(other, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 8, 4, 4)
    grad = torch.randn_like(x)
    for a, b in zip(step(norm, x, grad), step(compiled, x, grad)):
        close(a, b, 1e-5)
    for name, buffer in norm.named_buffers():
        close(getattr(other, name), buffer, 1e-5)


def test_in_a_resnet_of_mmdet(mmdet_resnet):
    net = mmdet_resnet(
        18,
        base_channels=8,
        norm_cfg=NORM_CFG,
        conv_cfg=dict(type='CenConv'),
        norm_eval=False,
        with_cp=True,
    )
    net.init_weights()
    assert not net.layer1[0].mabn2.weight.any()
    net.train()
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    sum(y.sum() for y in net(x)).backward()
    assert net.layer1[0].mabn2.weight.grad.abs().sum() > 0
    assert net.mabn1.num_batches_tracked == 1
    assert net.layer2[0].mabn1.num_batches_tracked == 1
    for parameter in net.parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all()


def test_registered_copied_and_pickled():
    assert MODELS.get('MABN') is MABN
    name, norm = mmcv.cnn.build_norm_layer(NORM_CFG, 16, postfix=1)
    assert name == 'mabn1' and isinstance(norm, MABN)
    assert 'simulated_batch_size=8' in repr(norm)
    norm(torch.randn(2, 16, 4, 4))
    x = torch.randn(2, 16, 4, 4)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert (other(x) == copy.deepcopy(norm)(x)).all()


@pytest.mark.parametrize(
    'kwargs, error, words',
    [
        (dict(simulated_batch_size=9), ValueError, 'multiple of.*9 and 2'),
        (dict(batch_size=0), ValueError, 'batch_size must be a positive'),
        (dict(batch_size=2.0), TypeError, 'batch_size.*2.0'),
        (dict(momentum=1.5), ValueError, 'momentum.*1.5'),
        (dict(momentum=None), TypeError, 'momentum'),
        (dict(eps=-1), ValueError, 'eps.*-1'),
        (dict(warmup_iters=-1), ValueError, 'warmup_iters.*-1'),
        (dict(num_features='8'), TypeError, 'num_features'),
    ],
)
def test_bad_arguments(kwargs, error, words):
    good = dict(num_features=8, batch_size=2, simulated_batch_size=8)
    with pytest.raises(error, match=words):
        MABN(**dict(good, **kwargs))


@pytest.mark.parametrize(
    'x, error, words',
    [
        (torch.zeros(1, 4, 3, 3), ValueError, r'\(1, 4, 3, 3\)'),
        (torch.zeros(1, 8), ValueError, r'\(1, 8\)'),
        (torch.zeros(1, 8, 3, 3, dtype=torch.int), TypeError, 'int32'),
    ],
)
def test_bad_inputs(x, error, words):
    with pytest.raises(error, match=words):
        MABN(8, 2, 8)(x)


def test_buffers_are_of_one_loss_scale():
    norm, other = MABN(6, 1, 2, warmup_iters=0), MABN(6, 1, 2, warmup_iters=0)
    for scale in (2.0**16, 2.0**12, 2.0**13, 1.0):
        set_loss_scale(norm, scale)
        x = torch.randn(1, 6, 4, 4)
        grad = torch.randn_like(x)
        got, expected = step(norm, x, scale * grad), step(other, x, grad)
        for a, b in zip(got[1:], expected[1:]):
            close(a / scale, b, 1e-5)
    close(norm.buffer_gz, other.buffer_gz, 1e-5)
