import copy
import warnings

import mmcv.cnn
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BCN

NORM_CFG = dict(type='BCN', num_groups=4, momentum=0.1)


def randomized(norm):
    """The layer with no parameter and no estimate at its default."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def textbook(norm, x, mean=None, var=None):
    """BCN as its formulas say, for given statistics of the batch part."""
    mean = norm.running_mean if mean is None else mean
    var = norm.running_var if var is None else var
    per_channel = norm.num_features // norm.weight.numel()
    weight = norm.weight.repeat_interleave(per_channel)
    bias = norm.bias.repeat_interleave(per_channel)

    def column(small):
        return small.view(-1, *(1 for _ in x.shape[2:]))

    z = (x - column(mean)) / column(var + norm.eps).sqrt()
    z = z * column(norm.batch_weight) + column(norm.batch_bias)
    groups = z.reshape(x.shape[0], norm.num_groups, -1)
    groups = groups - groups.mean(2, keepdim=True)
    var = groups.square().mean(2, keepdim=True)
    z = (groups / (var + norm.eps).sqrt()).view_as(x)
    return z * column(weight) + column(bias)


@pytest.mark.parametrize('case', ['micro_a', 'micro_b', 'large'])
def test_authors_vectors(vectors, case):
    v = vectors('bcn', case)
    norm = BCN(
        v['batch_weight'].numel(),
        v.number('num_groups'),
        eps=v.number('eps'),
        momentum=v.number('momentum'),
        estimate=case != 'large',
        dtype=torch.float64,
    )
    names = dict(
        weight='channel_weight',
        bias='channel_bias',
        batch_weight='batch_weight',
        batch_bias='batch_bias',
    )
    with torch.no_grad():
        for name, theirs in names.items():
            getattr(norm, name).copy_(v[theirs])
    steps = 0
    for step in v.steps():
        x = v[step + 'x'].requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(v[step + 'grad_y'])
        close(y, v[step + 'y'])
        close(x.grad, v[step + 'grad_x'])
        for name, theirs in names.items():
            close(getattr(norm, name).grad, v[f'{step}grad_{theirs}'])
        close(norm.running_mean, v[step + 'running_mean'])
        close(norm.running_var, v[step + 'running_var'])
        steps += 1
    assert steps >= 3 and norm.num_batches_tracked == steps
    close(norm.eval()(v['eval_x']), v['eval_y'])


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual.detach(), expected, rtol=tolerance, atol=tolerance
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 13),
    num_groups=st.integers(1, 16),
    spatial=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    training=st.booleans(),
    estimate=st.booleans(),
    affine=st.sampled_from(['group', 'channel']),
)
def test_parity_with_textbook(
    n, channels, num_groups, spatial, training, estimate, affine
):
    values = n * torch.Size(spatial).numel()
    assume(estimate or not training or values > 1)
    norm = BCN(
        channels,
        num_groups,
        momentum=0.3,
        estimate=estimate,
        channel_affine=affine,
        dtype=torch.float64,
    )
    randomized(norm).train(training)
    x = torch.randn(n, channels, *spatial, dtype=torch.double) * 3 + 1
    x.requires_grad_()
    grad = torch.randn_like(x)
    y = norm(x)
    got = torch.autograd.grad(y, [x, *norm.parameters()], grad)

    mean = var = None
    if training and not estimate:
        dims = (0, *range(2, x.dim()))
        mean, var = x.mean(dims), x.var(dims, correction=0)
    expected = textbook(norm, x, mean, var)
    wanted = torch.autograd.grad(expected, [x, *norm.parameters()], grad)
    close(y, expected, 1e-8)
    for a, b in zip(got, wanted):
        close(a, b, 1e-7)


@pytest.mark.parametrize('estimate', [True, False])
def test_gradcheck(estimate):
    norm = randomized(BCN(6, 2, estimate=estimate, dtype=torch.float64))
    norm.momentum = 0.0  # the same function at every call
    x = torch.randn(2, 6, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


# --- the update rate --------------------------------------------------------


def test_momentum_is_the_update_rate():
    norm = BCN(2, 1, momentum=0.25)
    x = torch.tensor([[[1.0, 3.0], [4.0, 4.0]]])
    norm(x)
    close(norm.running_mean, torch.tensor([0.5, 1.0]))
    # about the old mean, 0: the mean of squares
    close(norm.running_var, torch.tensor([0.75 + 0.25 * 5, 0.75 + 0.25 * 16]))


def test_momentum_annealing_averages_until_the_rate_is_reached():
    norm = BCN(3, 1, momentum=0.25, momentum_annealing=True).double()
    means = torch.randn(8, 3, dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    for t, m in enumerate(means, 1):
        norm(m.view(1, 3, 1, 1).expand(1, 3, 2, 2))
        mean += max(0.25, 1 / (1 + t)) * (m - mean)
        torch.testing.assert_close(norm.running_mean, mean)
    assert norm.num_batches_tracked == 8


def test_the_first_annealed_forward_is_alive():
    """A single value per channel, as in an image pooling, is not its mean."""
    norm = BCN(4, 2, momentum_annealing=True)
    x = torch.randn(1, 4, 1, 1, requires_grad=True)
    norm(x).square().sum().backward()
    assert (norm.weight.grad != 0).all()


@pytest.mark.parametrize(
    'estimates, count, expected',
    [
        (dict(running_mean=[2.0, 3.0], running_var=[4.0, 5.0]), None, 20),
        (dict(running_mean=[2.0, 3.0], running_var=[4.0, 5.0]), 0, 20),
        (dict(running_mean=[2.0, 3.0], running_var=[4.0, 5.0]), 3, 3),
        (dict(running_mean=[0.0, 0.0], running_var=[1.0, 1.0]), 0, 0),
    ],
)
def test_momentum_annealing_keeps_loaded_estimates(estimates, count, expected):
    """torchvision's BN checkpoints say that they have seen nothing."""
    norm = BCN(2, 1, momentum=0.05, momentum_annealing=True)
    state = nn.BatchNorm2d(2).state_dict()
    state.update({k: torch.tensor(v) for k, v in estimates.items()})
    del state['num_batches_tracked']
    if count is not None:
        state['num_batches_tracked'] = torch.tensor(count)
    norm.load_state_dict(state)
    assert norm.num_batches_tracked == expected
    norm(torch.randn(1, 2, 8, 8) + 9)
    if expected == 20:  # the rate is r at once
        assert norm.running_mean.max() < 4


def test_momentum_none_is_the_cumulative_average():
    norm = BCN(3, 1, momentum=None).double()
    images = torch.randn(5, 1, 3, 4, dtype=torch.double)
    for image in images:
        norm(image)
    close(norm.running_mean, images.mean((0, 1, 3)))


@pytest.mark.parametrize('estimate', [True, False])
def test_norm_eval_freezes_the_estimates(estimate, mmdet_resnet):
    backbone = mmdet_resnet(
        18, norm_cfg=dict(NORM_CFG, estimate=estimate), norm_eval=True
    )
    backbone.train()
    norm = backbone.bcn1
    x = torch.randn(2, 64, 4, 4) * 5 + 3
    y = norm(x)
    assert norm.num_batches_tracked == 0
    close(norm.running_mean, torch.zeros(64))
    close(y, textbook(norm, x), 1e-5)
    backbone.norm_eval = False
    backbone.train()
    norm(x)
    assert norm.num_batches_tracked == 1


# --- the traps --------------------------------------------------------------


def test_a_shared_layer_has_the_gradients_of_its_own_calls():
    """Five levels, one backward: buffers change under saved tensors."""
    norm = randomized(BCN(4, 2, momentum=0.5, dtype=torch.float64))
    levels = [
        torch.randn(1, 4, s, s, dtype=torch.double, requires_grad=True)
        for s in (5, 4, 3)
    ]
    reference = copy.deepcopy(norm)
    sum(norm(x).square().mul(0.1).sum() for x in levels).backward()
    got = [x.grad.clone() for x in levels] + [
        p.grad.clone() for p in norm.parameters()
    ]
    for x in levels:
        x.grad = None
    for x in levels:  # each call with its backward before the next update
        reference(x).square().mul(0.1).sum().backward()
    wanted = [x.grad for x in levels] + [
        p.grad for p in reference.parameters()
    ]
    for a, b in zip(got, wanted):
        close(a, b)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant):
    norm = randomized(BCN(4, 2, momentum=0.5, dtype=torch.float64))
    plain = copy.deepcopy(norm)
    x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
    y = checkpoint(norm, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    got, x.grad = x.grad, None
    plain(x).square().sum().backward()
    close(got, x.grad)
    close(norm.batch_weight.grad, plain.batch_weight.grad)
    assert norm.num_batches_tracked == 1
    close(norm.running_var, plain.running_var)


def test_with_cp_of_mmdet(mmdet_resnet):
    backbone = mmdet_resnet(
        18, base_channels=8, norm_cfg=NORM_CFG, with_cp=True, norm_eval=False
    )
    backbone.train()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sum(y.sum() for y in backbone(x)).backward()
    assert backbone.layer1[0].bcn1.num_batches_tracked == 1


def test_zero_rois():
    norm = BCN(8, 4)
    x = torch.randn(0, 8, 7, 7, requires_grad=True)
    y = norm(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert norm.num_batches_tracked == 0
    close(norm.running_var, torch.ones(8))
    for parameter in norm.parameters():  # DDP waits for each of them
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize('training', [True, False])
def test_one_pixel(training):
    norm = BCN(8, 4).train(training)
    y = norm(torch.randn(1, 8, 1, 1, requires_grad=True))
    y.sum().backward()
    assert y.isfinite().all()


def test_one_value_a_channel_is_refused_in_large_batch_training():
    norm = BCN(8, 4, estimate=False)
    x = torch.randn(1, 8, 1, 1)
    with pytest.raises(ValueError, match=r'more than one.*\(1, 8, 1, 1\)'):
        norm(x)
    assert norm.num_batches_tracked == 0
    assert norm(x.expand(2, -1, -1, -1)).isfinite().all()
    assert norm(x[:0]).shape == (0, 8, 1, 1)
    assert norm.eval()(x).isfinite().all()


@pytest.mark.parametrize('value', [float('inf'), float('nan'), 65504.0])
def test_an_overflow_does_not_poison_the_estimates(value):
    norm = BCN(4, 2, momentum=0.5)
    x = torch.randn(2, 4, 3, 3).half()
    x[0, 1, 0, 0] = value
    norm(x)
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert norm.running_mean[0] != 0  # the other channels learn


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
def test_half_in_half_out_with_float32_statistics(dtype, training):
    norm = randomized(BCN(8, 2)).train(training)
    reference = copy.deepcopy(norm).double()
    x = (torch.randn(2, 8, 9, 9) * 30 + 100).to(dtype).requires_grad_()
    y = norm(x)
    assert y.dtype == dtype and norm.running_mean.dtype == torch.float32
    double = x.detach().double().requires_grad_()
    expected = reference(double)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    expected.backward(grad.double())
    eps = torch.finfo(dtype).eps
    assert x.grad.dtype == dtype and norm.weight.grad.dtype == torch.float32
    close(y.double(), expected.detach(), 4 * eps)
    close(x.grad.double(), double.grad, 4 * eps)
    close(norm.running_var.double(), reference.running_var, 1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_model_cast_to_half(dtype):
    norm = randomized(BCN(8, 2)).to(dtype)
    x = torch.randn(2, 8, 4, 4, dtype=dtype, requires_grad=True)
    y = norm(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == norm.weight.grad.dtype == dtype


def test_autocast_keeps_half():
    block = nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8, 2), nn.ReLU(True))
    with torch.autocast('cpu', torch.bfloat16):
        y = block(torch.randn(1, 3, 4, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert block[1].batch_weight.grad.dtype == torch.float32


@pytest.mark.parametrize('mean', [1e3, -1e4])
def test_large_mean_and_tiny_variance(mean):
    norm = BCN(8, 2, eps=1e-12)
    reference = copy.deepcopy(norm).double()
    x = torch.randn(1, 8, 20, 20) * 0.05 + mean
    double = x.double().requires_grad_()
    x.requires_grad_()
    grad = torch.randn_like(x)
    for layer in (norm, reference):
        layer.running_mean.fill_(mean)
        layer.running_var.fill_(0.0025)
    y, expected = norm(x), reference(double)
    y.backward(grad)
    expected.backward(grad.double())
    # What float32 keeps of such numbers. E[x^2] - E[x]^2 keeps nothing.
    tolerance = 4 * abs(mean) * torch.finfo(x.dtype).eps / 0.05
    close(y.double(), expected.detach(), tolerance)
    scale = double.grad.abs().max()
    close(x.grad.double() / scale, double.grad / scale, tolerance)


def test_the_relu_that_follows_may_be_in_place():
    norm = BCN(8, 2)
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    F.relu(norm(x), inplace=True).sum().backward()
    in_place, x.grad = x.grad, None
    other = BCN(8, 2)
    F.relu(other(x)).sum().backward()
    close(in_place, x.grad)


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_channels_last_survives(grad, training):
    norm = randomized(BCN(8, 2)).train(training)
    other = copy.deepcopy(norm)
    x = torch.randn(2, 8, 5, 6)
    last = x.to(memory_format=torch.channels_last).requires_grad_(grad)
    x.requires_grad_(grad)
    y, expected = norm(last), other(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, expected.detach(), 1e-5)
    if grad:
        y.square().sum().backward()
        expected.square().sum().backward()
        assert last.grad.is_contiguous(memory_format=torch.channels_last)
        close(last.grad, x.grad, 1e-4)


@pytest.mark.parametrize('size', [(5,), (4, 5), (3, 4, 5)])
def test_strided_views(size):
    norm = randomized(BCN(4, 2)).eval()
    x = torch.randn(2, 8, *size)[:, ::2].transpose(-1, 1).transpose(-1, 1)
    close(norm(x), norm(x.contiguous()).detach(), 1e-6)


def test_zero_init_leaves_the_block_alive(mmdet_resnet):
    backbone = mmdet_resnet(
        50, base_channels=8, norm_cfg=NORM_CFG, zero_init_residual=True
    )
    backbone.init_weights()
    norm = backbone.layer1[0].norm3
    assert not norm.weight.any(), 'the output scale is what starts at 0'
    assert (norm.batch_weight == 1).all(), 'with it the block would be dead'
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad.isfinite().all() and norm.weight.grad.any()


def test_weight_decay_rules_see_a_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8, 2))
    optim = DefaultOptimWrapperConstructor(
        dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1)),
        dict(norm_decay_mult=0.0),
    )(model)
    norm = {id(p) for p in model[1].parameters()}
    for group in optim.param_groups:
        ours = {id(p) for p in group['params']} <= norm
        assert group['weight_decay'] == (0 if ours else 0.1)


def test_registered_where_every_scope_finds_it():
    assert MODELS.get('BCN') is BCN
    name, norm = mmcv.cnn.build_norm_layer(NORM_CFG, 16, postfix=1)
    assert name == 'bcn1' and isinstance(norm, BCN)
    frozen = dict(NORM_CFG, requires_grad=False)
    _, norm = mmcv.cnn.build_norm_layer(frozen, 16)
    assert not any(p.requires_grad for p in norm.parameters())


def test_deepcopy_and_pickle(tmp_path):
    norm = randomized(BCN(8, 2))
    torch.save(norm, tmp_path / 'norm.pth')
    x = torch.randn(1, 8, 3, 3)
    for twin in (
        copy.deepcopy(norm),
        torch.load(tmp_path / 'norm.pth', weights_only=False),
    ):
        close(twin.eval()(x), norm.eval()(x).detach())


@pytest.mark.parametrize('annealing', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_compiles_without_graph_break(training, annealing):
    norm = randomized(BCN(8, 2, momentum_annealing=annealing)).train(training)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    for _ in range(2):
        y, expected = compiled(x), twin(x)
        close(y, expected.detach(), 1e-5)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        close(grad, wanted, 1e-4)
    close(norm.running_var, twin.running_var, 1e-6)
    assert norm.num_batches_tracked == twin.num_batches_tracked


# --- arguments and inputs ---------------------------------------------------


@pytest.mark.parametrize(
    ('channels', 'groups'), [(48, 24), (32, 32), (7, 7), (37, 1), (96, 32)]
)
def test_groups_divide_the_channels(channels, groups):
    norm = BCN(channels, 32)
    assert norm.num_groups == groups
    assert f'num_groups={groups}' in repr(norm)


@pytest.mark.parametrize(
    ('channels', 'groups', 'advice'), [(32, 32, 16), (18, 32, 9), (2, 4, 1)]
)
def test_one_channel_a_group_warns(channels, groups, advice):
    with pytest.warns(UserWarning, match='one channel a group') as caught:
        BCN(channels, groups)
    text = str(caught[0].message)
    assert f'BCN({channels}, num_groups={groups})' in text
    assert f"norm_cfg=dict(type='BCN', num_groups={advice})" in text
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        BCN(channels, advice)
        BCN(1)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'words'),
    [
        (dict(num_groups=0), ValueError, ['num_groups', 'positive', '0']),
        (dict(num_groups=2.0), TypeError, ['num_groups', '2.0', 'float']),
        (dict(num_features=-1), ValueError, ['num_features', '-1']),
        (dict(momentum=1.5), ValueError, ['momentum', '[0, 1]', '1.5']),
        (dict(momentum_annealing=1), TypeError, ['momentum_annealing', '1']),
        (dict(momentum=-0.1), ValueError, ['momentum', '-0.1']),
        (dict(momentum='0.1'), TypeError, ['momentum', "'0.1'"]),
        (dict(momentum=float('nan')), ValueError, ['momentum', 'nan']),
        (dict(eps=-1e-5), ValueError, ['eps', '-1e-05']),
        (dict(estimate=1), TypeError, ['estimate', '1']),
        (dict(channel_affine='groups'), ValueError, ["'group'", "'groups'"]),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error) as info:
        BCN(**{'num_features': 8, **kwargs})
    for word in ['BCN', *words]:
        assert word in str(info.value)


@pytest.mark.parametrize(
    ('x', 'error', 'words'),
    [
        (torch.ones(1, 4, 3, 3), ValueError, ['8', '(1, 4, 3, 3)']),
        (torch.ones(2, 8), ValueError, ['(2, 8)', '3 to 5']),
        (torch.ones(1, 8, 1, 1, 1, 1), ValueError, ['3 to 5']),
        (torch.ones(1, 8, 3, 3).long(), TypeError, ['torch.int64']),
        ('image', TypeError, ['str']),
    ],
)
def test_bad_inputs(x, error, words):
    with pytest.raises(error) as info:
        BCN(8)(x)
    for word in ['BCN(8)', *words]:
        assert word in str(info.value)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_normalizes_with_the_estimates_that_the_buffers_hold(dtype):
    """Activation checkpointing, which has only those, does it again."""
    norm = BCN(8, 4, momentum=0.3).to(dtype)
    x = torch.randn(2, 8, 5, 5, dtype=dtype) * 3 + 1
    y = norm(x)
    norm.eval()
    assert torch.equal(norm(x), y)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA GPU: none here'
)
@pytest.mark.parametrize('layout', ['contiguous_format', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('estimate', [True, False])
def test_cuda_is_the_definition(estimate, dtype, layout):
    wide = BCN(48, 8, momentum=0.3, estimate=estimate).double()
    norm = copy.deepcopy(wide).float().cuda()
    x, grad = torch.randn(2, 2, 48, 37, 41, dtype=torch.float64).to(dtype)
    x = x * 2 + 1
    results = []
    for layer, device in ((wide, 'cpu'), (norm, 'cuda')):
        kind = torch.float64 if device == 'cpu' else dtype
        given, out = (
            t.to(device, kind).contiguous(memory_format=getattr(torch, layout))
            for t in (x, grad)
        )
        given.requires_grad_()
        for _ in range(2):
            y = layer(given)
        y.backward(out)
        results.append(
            [y, given.grad, *(p.grad for p in layer.parameters())]
            + list(layer.buffers())
        )
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for expected, got in zip(*results):
        size = expected.abs().max() + 1e-6
        error = (got.double().cpu() - expected).abs().max() / size
        assert error < tolerance, error
