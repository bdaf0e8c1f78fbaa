"""BCN with statistics of the backward pass, averaged over the last images."""

import copy
import pickle
import warnings

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BCN, SyncBCN, fold_for_inference, set_loss_scale
from wsbcn_mm.functional import kernels
from wsbcn_mm.functional.kernels import compiled

C, GROUPS = 8, 4
AVERAGINGS = [1, 3, 5, 0.05, 0.6]


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance
    )


def randomized(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 1.5)
    return norm


def make(grad_averaging=3, momentum=0.1, **kwargs):
    kwargs = dict(dict(dtype=torch.float64), **kwargs)
    return randomized(
        BCN(
            C,
            GROUPS,
            momentum=momentum,
            grad_averaging=grad_averaging,
            **kwargs,
        )
    )


def images(count=1, size=(4, 3), dtype=torch.float64):
    return (2 * torch.randn(count, C, *size) + 1).to(dtype)


def step(norm, x, grad):
    x = x.clone().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters())]


def averages(norm):
    """The remembered calls in the order in which they came."""
    order = norm.grad_images.argsort()
    return norm.grad_statistics[order], norm.grad_images[order]


def same_averages(a, b, tolerance=1e-9):
    for one, other in zip(averages(a), averages(b)):
        close(one, other, tolerance)


class Definition:
    """What the layer's gradient is, from all activations it has seen.

    It keeps them and the gradients that constant estimates would give, and
    fits the latter to the former by least squares at every backward pass.
    """

    def __init__(self, norm):
        self.norm = norm
        self.calls = []

    def forward(self, x):
        """The output, and a function from its gradient to that of x."""
        constant = copy.deepcopy(self.norm)
        constant.grad_averaging = None
        leaf = x.clone().requires_grad_()
        y = constant(leaf)

        def backward(grad):
            (g,) = torch.autograd.grad(y, leaf, grad)
            self.calls.append((x, g))
            fits = torch.stack([self._fit(c) for c in range(C)], 1)
            alpha, beta = fits[:, :, None, None]
            return g - alpha - beta * x

        return y.detach(), backward

    def _fit(self, channel):
        gram, moment = torch.zeros(2, 2).double(), torch.zeros(2).double()
        gram[1, 1] = self.norm.eps
        for weight, call in zip(self._weights(), self.calls):
            x, g = (t[:, channel].flatten() for t in call)
            design = torch.stack([torch.ones_like(x), x], 1)
            gram += weight * design.t() @ design / len(x)
            moment += weight * design.t() @ g / len(x)
        return torch.linalg.solve(gram, moment)

    def _weights(self):
        sizes = [len(x) for x, _ in self.calls]
        after = [sum(sizes[i:]) for i in range(len(sizes))]  # and its own
        averaging = self.norm.grad_averaging
        if isinstance(averaging, int):
            inside = [
                i == len(sizes) - 1 or n - size < averaging
                for i, (n, size) in enumerate(zip(after, sizes))
            ]
            return [i / sum(inside) for i in inside]
        kept = 1 - averaging
        weights = [
            kept ** (n - size) - kept**n for n, size in zip(after, sizes)
        ]
        return [w / sum(weights) for w in weights]


@pytest.mark.parametrize('grad_averaging', AVERAGINGS)
@pytest.mark.parametrize('counts', [[1] * 7, [2, 1, 3, 1, 2]])
def test_definition(grad_averaging, counts):
    norm = make(grad_averaging)
    definition = Definition(norm)
    for i, count in enumerate(counts):
        x = images(count, (4, 3 + i))  # of any size
        grad = torch.randn_like(x)
        expected, backward = definition.forward(x)
        y, grad_x, *_ = step(norm, x, grad)
        close(y, expected)
        close(grad_x, backward(grad), 1e-8)


def large_and_small(grad_averaging, count):
    """A large-batch layer, and a small one with a batch's statistics."""
    x = images(count)
    large = randomized(BCN(C, GROUPS, estimate=False).double())
    small = make(grad_averaging, momentum=0.0)
    small.load_state_dict(large.state_dict())
    small.running_mean.copy_(x.mean((0, 2, 3)))
    small.running_var.copy_(x.var((0, 2, 3), correction=0))
    return x, large, small


@pytest.mark.parametrize('grad_averaging', [1, 5, 9, 0.05])
def test_a_window_of_the_batch_gives_its_own_gradient(grad_averaging):
    """With the batch's statistics for estimates."""
    x, large, small = large_and_small(grad_averaging, 5)
    grad = torch.randn_like(x)
    for got, expected in zip(step(small, x, grad), step(large, x, grad)):
        close(got, expected)


def test_a_window_of_images_one_by_one_gives_that_of_their_batch():
    x, large, small = large_and_small(5, 5)
    grad = torch.randn_like(x)
    expected = step(large, x, grad)[1]
    for _ in range(2):
        for image in range(5):
            one = slice(image, image + 1)
            got = step(small, x[one], grad[one])[1]
    close(got, expected[-1:])


def test_by_default_nothing_is_averaged():
    norm = BCN(C, GROUPS)
    assert norm.grad_averaging is None
    assert not [k for k in norm.state_dict() if k.startswith('grad_')]


# --- several calls, several passes -------------------------------------------


def test_accumulated_passes_and_calls_of_a_shared_layer():
    """Several calls before one backward pass, which begins with the last."""
    norm = make(4)
    definition = Definition(norm)
    for _ in range(3):
        xs = [images(1, (s, s)).requires_grad_() for s in (5, 4, 3)]
        grads = [torch.randn_like(x) for x in xs]
        ys, backwards = [], []
        for x in xs:
            expected, backward = definition.forward(x.detach())
            ys.append(norm(x))
            close(ys[-1].detach(), expected)
            backwards.append(backward)
        torch.autograd.backward(ys, grads)
        for x, grad, backward in list(zip(xs, grads, backwards))[::-1]:
            close(x.grad, backward(grad), 1e-8)
    assert norm.grad_images.max() == 9


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('grad_averaging', [3, 0.3])
@pytest.mark.parametrize('calls', [1, 3])
def test_activation_checkpointing(use_reentrant, grad_averaging, calls):
    """A forward that is done again is one call, and moves averages once."""
    norm = make(grad_averaging, momentum=0.1 if calls == 1 else 0.0)
    other = copy.deepcopy(norm)
    for _ in range(2):
        xs = [images().requires_grad_() for _ in range(calls)]
        results = []
        for layer, wrapped in (
            (norm, lambda x: checkpoint(norm, x, use_reentrant=use_reentrant)),
            (other, other),
        ):
            layer.zero_grad()
            for x in xs:
                x.grad = None
            sum(wrapped(x).square().sum() for x in xs).backward()
            results.append([t.grad for t in (*xs, *layer.parameters())])
        for a, b in zip(*results):
            close(a, b)
        same_averages(norm, other)
    assert norm.grad_images.max() == 2 * calls


def test_with_cp_of_mmdet(mmdet_resnet):
    backbone = mmdet_resnet(
        18,
        base_channels=8,
        norm_cfg=dict(type='BCN', num_groups=4, grad_averaging=4),
        with_cp=True,
        norm_eval=False,
    )
    backbone.train()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sum(y.sum() for y in backbone(x)).backward()
    assert backbone.layer1[0].bcn1.grad_images.tolist() == [1, 0, 0]


@pytest.mark.parametrize('grad_averaging', [1, 4, 0.3])
def test_losses_with_backward_passes_of_their_own(grad_averaging):
    """The first pass of a call counts; all add up to that of the sum."""
    norm = make(grad_averaging)
    for _ in range(2):
        step(norm, images(), torch.randn(1, C, 4, 3).double())
    other = copy.deepcopy(norm)
    x, grads = images(), torch.randn(3, 1, C, 4, 3).double()
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    for grad in grads:
        y.backward(grad, retain_graph=True)
    close(leaf.grad, step(other, x, grads.sum(0))[1])
    close(norm.grad_images, other.grad_images)
    step(make(grad_averaging), x, grads[0])


# --- what moves nothing ------------------------------------------------------


def unchanged(norm, action):
    before = copy.deepcopy(norm.state_dict())
    action()
    for key, value in norm.state_dict().items():
        if key.startswith('grad_'):
            close(value, before[key], 0)


def test_in_evaluation_estimates_are_constants():
    """norm_eval, too: the gradient is that of an affine."""
    norm, plain = make(), make(None)
    step(norm, images(), images())
    plain.load_state_dict(norm.state_dict())
    norm.eval(), plain.eval()

    def compare():
        x, grad = images(), images()
        for a, b in zip(step(norm, x, grad), step(plain, x, grad)):
            close(a, b, 0)

    unchanged(norm, compare)


def test_estimates_that_do_not_move_have_the_gradient_of_training():
    """As a Batch Normalization in training has, tracking or not."""
    norm = make(momentum=0.0)
    other = copy.deepcopy(norm)
    other.momentum, other.track_running_stats = 0.1, False
    for _ in range(3):
        x, grad = images(), images()
        for a, b in zip(step(norm, x, grad), step(other, x, grad)):
            close(a, b)
    assert norm.grad_images.max() == other.grad_images.max() == 3


def test_what_is_not_differentiated_moves_nothing():
    norm = make()
    step(norm, images(), images())

    def forwards():
        with torch.no_grad():
            norm(images())
        norm(images())
        for parameter in norm.parameters():
            parameter.requires_grad_(False)
        norm(images())

    unchanged(norm, forwards)
    assert norm.num_batches_tracked == 4


def test_frozen_parameters_do_not_change_the_gradient_of_the_input():
    norm = make()
    frozen = copy.deepcopy(norm).requires_grad_(False)
    for _ in range(3):
        x, grad = images(), images()
        leaf = x.clone().requires_grad_()
        frozen(leaf).backward(grad)
        close(leaf.grad, step(norm, x, grad)[1])
    same_averages(norm, frozen)


@pytest.mark.parametrize('norm', [BCN, SyncBCN])
def test_zero_rois(norm):
    norm = norm(C, GROUPS, grad_averaging=4)
    step(norm, images(dtype=torch.float32), images(dtype=torch.float32))
    x = torch.randn(0, C, 7, 7)
    unchanged(norm, lambda: step(norm, x, x))
    for parameter in norm.parameters():
        assert not parameter.grad.any()


@pytest.mark.parametrize('backend', [kernels.plain, kernels.cpu, compiled])
@pytest.mark.parametrize('grad_averaging', [4, 0.3])
@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_an_overflow_leaves_nothing_behind(backend, grad_averaging, value):
    """From the first step on, where loss scaling overflows most."""
    norm = make(grad_averaging, dtype=torch.float32)
    norm.running_mean.zero_()
    other = copy.deepcopy(norm)
    with kernels.use('cpu', backend):
        for bad in (True, False, True, False):
            x = images(dtype=torch.float32)
            grad = torch.randn_like(x)
            if bad:
                for broken in (
                    (x, grad.index_fill(1, torch.tensor(2), value)),
                    (x.index_fill(1, torch.tensor(2), value), grad),
                ):
                    grads = step(norm, *broken)[1]
                    assert not grads[:, 2].isfinite().any()  # and is seen
                    norm.running_mean.copy_(other.running_mean)
                    norm.running_var.copy_(other.running_var)
            else:
                got, wanted = step(norm, x, grad), step(other, x, grad)
                for a, b in zip(got, wanted):
                    close(a, b, 1e-6)
            same_averages(norm, other, 1e-6)


# --- state -------------------------------------------------------------------


@pytest.mark.parametrize('grad_averaging', [4, 0.3])
def test_training_goes_on_from_a_state_dict(grad_averaging):
    norm = make(grad_averaging)
    for _ in range(5):
        step(norm, images(), images())
    other = make(grad_averaging)
    other.load_state_dict(norm.state_dict())
    for twin in (
        other,
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
    ):
        source = copy.deepcopy(norm)
        for _ in range(3):
            x, grad = images(), images()
            for a, b in zip(step(source, x, grad), step(twin, x, grad)):
                close(a, b, 0)


def test_state_is_small():
    rows = {1: 1, 16: 15, 0.05: 1}
    for grad_averaging, count in rows.items():
        norm = BCN(64, grad_averaging=grad_averaging)
        assert norm.grad_statistics.shape == (count, 4, 64)
        assert norm.grad_images.shape == (count,)


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('source', [None, 8, 0.3])
def test_other_checkpoints_load_and_averages_begin_anew(source, assign):
    norm = make(4)
    step(norm, images(), images())
    checkpoint = make(source)
    step(checkpoint, images(), images())
    norm.load_state_dict(checkpoint.state_dict(), assign=assign)
    close(norm.running_mean, checkpoint.running_mean)
    assert not norm.grad_images.any() and not norm.grad_statistics.any()
    step(norm, images(), images())
    assert norm.grad_images.max() == 1
    plain = make(None)
    plain.load_state_dict(norm.state_dict(), assign=assign)
    assert plain.state_dict().keys() == make(None).state_dict().keys()


@pytest.mark.parametrize('source', [nn.BatchNorm2d(C), nn.GroupNorm(4, C)])
def test_checkpoints_of_other_layers_load(source):
    norm = make(4)
    step(norm, images(), images())
    norm.load_state_dict(source.state_dict())
    assert not norm.grad_images.any()


def test_a_meta_layer_is_filled_by_a_checkpoint():
    with torch.device('meta'):
        norm = BCN(C, GROUPS, grad_averaging=4)
    norm.load_state_dict(BCN(C, GROUPS).state_dict(), assign=True)
    step(norm, images(dtype=torch.float32), images(dtype=torch.float32))
    assert norm.grad_images.max() == 1


def test_reset_forgets_the_averages():
    norm = make(4)
    step(norm, images(), images())
    norm.reset_running_stats()
    assert not norm.grad_images.any() and not norm.grad_statistics.any()


@pytest.mark.parametrize('update_buffers', [False, True])
def test_an_averaged_model_evaluates_and_changes_no_averages(update_buffers):
    model = nn.Sequential(make(4))
    ema = ExponentialMovingAverage(model, 0.5, update_buffers=update_buffers)
    for _ in range(3):
        step(model[0], images(), images())
        ema.update_parameters(model)
    twin = copy.deepcopy(model)
    x = images()
    assert ema.eval()(x).isfinite().all()
    grad = images()
    for a, b in zip(step(model[0], x, grad), step(twin[0], x, grad)):
        close(a, b, 0)


def test_evaluation_and_folding_are_those_without():
    norm = make(4)
    net = nn.Sequential(nn.Conv2d(3, C, 3), norm.float()).eval()
    plain = make(None, dtype=torch.float32)
    plain.load_state_dict(norm.state_dict())
    other = nn.Sequential(net[0], plain).eval()
    x = torch.randn(1, 3, 8, 8)
    close(net(x), other(x), 0)
    close(fold_for_inference(net)(x), fold_for_inference(other)(x), 0)


# --- numbers -----------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    norm = make(4, dtype=torch.float32)
    wide = copy.deepcopy(norm).double()
    half = copy.deepcopy(norm).to(dtype)
    for _ in range(3):
        x, grad = images(2), torch.randn(2, C, 4, 3)
        expected = step(wide, x, grad.double())
        for layer in (norm, half):
            got = step(layer, x.to(dtype), grad.to(dtype))
            assert got[0].dtype == got[1].dtype == dtype
            close(got[1].double(), expected[1], 5e-2)


@pytest.mark.parametrize('as_tensor', [False, True])
@pytest.mark.parametrize('grad_averaging', [4, 0.3])
def test_averages_are_of_one_loss_scale(grad_averaging, as_tensor):
    norm, other = make(grad_averaging), make(grad_averaging)
    other.load_state_dict(norm.state_dict())
    for scale in (2.0**16, 2.0**12, 2.0**13, 1.0):
        set_loss_scale(norm, torch.tensor(scale) if as_tensor else scale)
        x, grad = images(), images()
        got = step(norm, x, grad * scale)
        for a, b in zip(got[1:], step(other, x, grad)[1:]):
            close(a / scale, b)
    same_averages(norm, other)


def test_float16_without_a_loss_scale_is_warned_of():
    norm, x = make(4, dtype=torch.float32), images().half()
    with pytest.warns(UserWarning, match='LossScaleHook.*set_loss_scale'):
        norm(x)
    set_loss_scale(nn.Sequential(norm), 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        norm(x)


def test_a_large_mean_keeps_its_digits():
    """With estimates that know nothing of it yet."""
    norm = BCN(C, GROUPS, momentum=0.0, grad_averaging=3)
    wide = copy.deepcopy(norm).double()
    for _ in range(3):
        x, grad = images(1, (16, 16)) + 1e3, torch.randn(1, C, 16, 16)
        x = x.float()
        got = step(norm, x, grad)[1].double()
        close(got, step(wide, x.double(), grad.double())[1], 1e-4)


def test_channels_last():
    norm = make(4, dtype=torch.float32)
    other = copy.deepcopy(norm)
    for _ in range(2):
        x, grad = images(2, dtype=torch.float32), torch.randn(2, C, 4, 3)
        got = step(norm, x.contiguous(memory_format=torch.channels_last), grad)
        assert got[1].is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(got, step(other, x, grad)):
            close(a, b, 1e-5)


# --- compilers and transforms ------------------------------------------------


class Model(nn.Module):
    """Two levels share a layer."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 1).double(), norm

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.norm(x[..., ::2] * 2)


def compiled_like_eager(backend, grad_averaging):
    torch._dynamo.reset()
    model = Model(make(grad_averaging))
    twin = copy.deepcopy(model)
    module = torch.compile(twin, fullgraph=True, backend=backend)
    for _ in range(3):
        x = images(2)
        grad = torch.randn(2, C, 4, 2).double()
        got = step(module, x, grad)
        for a, b in zip(got, step(model, x, grad)):
            close(a, b)
        same_averages(twin.norm, model.norm)
    assert model.norm.grad_images.max() == 12


@pytest.mark.parametrize('grad_averaging', [8, 0.3])
def test_compiles_without_graph_break(grad_averaging):
    compiled_like_eager('aot_eager', grad_averaging)


@pytest.mark.slow
@pytest.mark.parametrize('grad_averaging', [8, 0.3])
def test_compile_with_inductor(grad_averaging):
    compiled_like_eager('inductor', grad_averaging)


def test_transforms_and_gradients_of_gradients_are_refused():
    norm = make(4)
    with pytest.raises(RuntimeError, match=r'BCN\(8.*torch\.func'):
        torch.func.grad(lambda x: norm(x).sum())(images())
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match='create_graph.*grad_averaging'):
        torch.autograd.grad(norm(x).sum(), x, create_graph=True)
    assert torch.func.grad(lambda x: norm.eval()(x).sum())(images()).any()


# --- arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    'value, error, words',
    [
        (True, TypeError, 'grad_averaging.*True'),
        ('16', TypeError, "grad_averaging.*'16'"),
        (0, ValueError, 'at least 1 image, got 0'),
        (1.0, ValueError, 'rate between 0 and 1, got 1.0'),
        (16.0, ValueError, r'an int.*got 16\.0'),
        (float('nan'), ValueError, 'got nan'),
    ],
)
def test_bad_arguments(value, error, words):
    with pytest.raises(error, match=words):
        BCN(C, GROUPS, grad_averaging=value)


def test_it_is_for_estimates():
    with pytest.raises(ValueError, match='grad_averaging=4.*estimate=True'):
        BCN(C, GROUPS, estimate=False, grad_averaging=4)


def test_repr():
    assert 'grad_averaging=0.05' in repr(BCN(C, GROUPS, grad_averaging=0.05))
