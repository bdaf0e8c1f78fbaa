from functools import partial

import pytest
import torch
from torch import nn

from wsbcn_mm import BCN, ConvWS
from wsbcn_mm.functional import (
    group_coefficients,
    kernels,
    moments,
    normalize,
)
from wsbcn_mm.functional.engine import _definition
from wsbcn_mm.functional.kernels import compiled


def coefficients(mean, var, weight, bias):
    return group_coefficients(mean, var, weight, bias, num_groups=2, eps=1e-5)


def inputs(shape=(2, 4, 3, 5), dtype=torch.float64):
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    return [
        t.requires_grad_()
        for t in (x, torch.randn(4, dtype=dtype), torch.randn(4, dtype=dtype))
    ]


def normalized(x, *parameters):
    return normalize(x, *moments(x), coefficients, *parameters)


def test_is_group_normalization():
    x, weight, bias = inputs()
    torch.testing.assert_close(
        normalized(x, weight, bias),
        nn.functional.group_norm(x, 2, weight, bias),
    )


def test_gradcheck():
    assert torch.autograd.gradcheck(normalized, inputs((1, 4, 5)))


def test_gradgradcheck():
    assert torch.autograd.gradgradcheck(normalized, inputs((1, 4, 2)))


@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize('create_graph', [False, True])
def test_any_part_may_be_without_a_gradient(wanted, create_graph):
    tensors = inputs()
    expected = torch.autograd.grad(
        _definition(tensors[0], coefficients, *tensors[1:]).sin().sum(),
        [tensors[i] for i in wanted],
    )
    for i in range(3):
        tensors[i] = tensors[i].detach().requires_grad_(i in wanted)
    got = torch.autograd.grad(
        normalized(*tensors).sin().sum(),
        [tensors[i] for i in wanted],
        create_graph=create_graph,
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('backend', [kernels.plain, kernels.cpu, compiled])
@pytest.mark.parametrize('mean', [0.0, 1e3])
def test_a_mean_far_from_zero(backend, mean):
    x = (torch.randn(2, 4, 40, 50) * 0.5 + mean).requires_grad_()
    wide = x.detach().double().requires_grad_()
    weight, bias = torch.ones(4), torch.zeros(4)
    with kernels.use('cpu', backend):
        y = normalized(x, weight, bias)
        y.sin().sum().backward()
    expected = _definition(wide, coefficients, weight.double(), bias.double())
    expected.sin().sum().backward()
    tolerance = 1e-5 if mean == 0 else 2e-3  # float32 has no more digits
    assert (y - expected).abs().max() < tolerance
    assert (x.grad - wide.grad).abs().max() < 10 * tolerance


def test_what_is_saved_is_the_input_and_small_tensors():
    x, weight, bias = inputs((1, 4, 50, 50), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t, lambda t: t
    ):
        normalized(x, weight, bias)
    large = [t for t in saved if t.numel() > 4]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


def test_torch_func():
    x, weight, bias = (t.detach() for t in inputs())

    def loss(function, x, weight, bias):
        return function(x, weight, bias).sin().sum()

    def definition(x, *parameters):
        return _definition(x, coefficients, *parameters)

    for transform in (
        partial(torch.func.grad, argnums=(0, 1, 2)),
        partial(torch.func.jacrev, argnums=1),
        partial(torch.func.hessian, argnums=2),
    ):
        torch.testing.assert_close(
            transform(partial(loss, normalized))(x, weight, bias),
            transform(partial(loss, definition))(x, weight, bias),
        )
    samples = torch.func.vmap(
        lambda sample: normalized(sample[None], weight, bias)[0]
    )(x)
    torch.testing.assert_close(samples, normalized(x, weight, bias))


class Model(nn.Module):
    """Two levels share a head, as in FPN."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            ConvWS(3, 8, 3), BCN(8, 4), nn.ReLU(inplace=True)
        )
        self.head = nn.Sequential(
            ConvWS(8, 8, 3, padding=1), BCN(8, 4), nn.ReLU()
        )

    def forward(self, x):
        x = self.body(x)
        return self.head(x).mean() + self.head(x[..., ::2]).mean()


def compiled_like_eager(backend, training):
    torch._dynamo.reset()
    # In float64, since a ReLU whose input rounds to another sign shows.
    eager, model = (Model().double().train(training) for _ in range(2))
    model.load_state_dict(eager.state_dict())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        expected, loss = eager(x), compiled(x)
        torch.testing.assert_close(loss, expected)
        for each, module in ((expected, eager), (loss, model)):
            module.zero_grad()
            each.backward()
        for a, b in zip(model.parameters(), eager.parameters()):
            torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(model.buffers(), eager.buffers()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('training', [False, True])
def test_compile_has_no_graph_break(training):
    compiled_like_eager('aot_eager', training)


@pytest.mark.slow
def test_compile_with_inductor():
    compiled_like_eager('inductor', training=True)
