import copy
import io
import pickle
import time
from functools import partial

import authors
import pytest
import torch
from mmengine.runner import load_checkpoint, save_checkpoint
from mmengine.runner.checkpoint import (
    get_state_dict,
    load_state_dict,
    weights_to_cpu,
)
from torch import nn

from wsbcn_mm import BCN, BGN, MABN, CenConv, ConvWN, ConvWS
from wsbcn_mm.layers.checkpoint_names import RECORD

LOADERS = {
    'torch': lambda m, s, strict=True: m.load_state_dict(s, strict=strict),
    'mmengine': lambda m, s, strict=True: load_state_dict(m, s, strict=strict),
}


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


class Block(nn.Module):
    """Names its norms after their type, as the MM libraries do."""

    def __init__(self, abbr, norm, conv=nn.Conv2d):
        super().__init__()
        self.abbr = abbr
        self.conv1 = conv(3, 8, 3, bias=False)
        self.add_module(f'{abbr}1', norm(8))
        self.conv2 = conv(8, 8, 3, bias=False)
        self.add_module(f'{abbr}2', norm(8))
        self.downsample = nn.Sequential(conv(8, 8, 1), norm(8))

    def forward(self, x):
        x = getattr(self, f'{self.abbr}1')(self.conv1(x)).relu()
        x = getattr(self, f'{self.abbr}2')(self.conv2(x)).relu()
        return self.downsample(x)


def randomized(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            noise = noise.to(value)
            centered = 'mean' in name or 'bias' in name or value.dim() > 1
            value.copy_(noise - 0.5 if centered else noise + 0.5)
    net.eval()
    return net


def bn():
    return randomized(Block('bn', nn.BatchNorm2d))


def gn(conv=nn.Conv2d):
    return randomized(Block('gn', lambda c: nn.GroupNorm(4, c), conv))


def bcn(conv=nn.Conv2d, **kwargs):
    return Block('bcn', lambda c: BCN(c, 4, **kwargs), conv).eval()


def state_of(net):
    return get_state_dict(net)


@pytest.mark.parametrize('conv', [nn.Conv2d, ConvWS])
def test_gn_into_bcn_computes_the_same(load, conv):
    source, target = gn(conv), bcn(conv, channel_affine='channel')
    load(target, state_of(source))
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert (target(x) - source(x)).abs().max() < 1e-5


def test_bn_goes_into_the_batch_part(load):
    source, target = bn(), bcn()
    load(target, state_of(source))
    for old, new in ((source.bn1, target.bcn1), (source.bn2, target.bcn2)):
        assert torch.equal(new.batch_weight, old.weight)
        assert torch.equal(new.batch_bias, old.bias)
        assert torch.equal(new.running_mean, old.running_mean)
        assert torch.equal(new.running_var, old.running_var)
        assert new.weight.eq(1).all() and new.bias.eq(0).all()


def test_mabn_goes_into_the_batch_part(load):
    source = randomized(Block('mabn', lambda c: MABN(c, 1, 2)))
    target = bcn()
    load(target, state_of(source))
    x = torch.randn(2, 8, 5, 5)
    norm = nn.GroupNorm(4, 8, affine=False)
    assert torch.allclose(
        target.bcn1(x), norm(source.mabn1(x)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('part', ['bn', 'pbn'])
def test_authors_layout(load, part):
    target = nn.Sequential(BCN(8, 4))
    state = {
        '0.weight': torch.rand(1, 4, 1),
        '0.bias': torch.rand(1, 4, 1),
        f'0.{part}.weight': torch.rand(8),
        f'0.{part}.bias': torch.rand(8),
        f'0.{part}.running_mean': torch.rand(8),
        f'0.{part}.running_var': torch.rand(8),
        f'0.{part}.num_batches_tracked': torch.tensor(3),
    }
    if part == 'bn':
        state['0.bn.estbn_moving_speed'] = torch.rand(1)
    load(target, dict(state))
    assert torch.equal(target[0].weight, state['0.weight'].flatten())
    assert torch.equal(target[0].batch_bias, state[f'0.{part}.bias'])
    assert target[0].num_batches_tracked == 3
    del state[f'0.{part}.num_batches_tracked']  # as their test script does
    load(target, dict(state), strict=False)


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_the_authors_layers_compute_the_same(load, inside, training):
    conv = authors.ImageNetConv2d if inside else authors.Conv2d
    theirs = nn.Sequential(conv(3, 8, 3, bias=False), authors.BCNorm(8, 4))
    ours = nn.Sequential(
        ConvWS(3, 8, 3, bias=False, eps_inside_sqrt=inside),
        BCN(8, 4, estimate=False),
    )
    randomized(theirs)
    theirs[0].weight.data *= 0.02
    load(ours, theirs.state_dict())
    x = torch.randn(2, 3, 6, 6, dtype=torch.double, requires_grad=True)
    results = []
    for net in (ours, theirs):
        y = net.double().train(training)(x)
        y.square().mul(y.detach().cos()).sum().backward()
        results.append([y, x.grad, net[0].weight.grad])
        x.grad = None
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('head', ['fc', 'aspp'])
@pytest.mark.parametrize('inside', [False, True])
def test_the_authors_form_is_known_by_the_keys(load, messages, head, inside):
    """With eps inside the square root in their ImageNet code only."""
    theirs = nn.Sequential()
    theirs.conv1 = authors.Conv2d(3, 8, 3, bias=False)
    theirs.bn1 = authors.BCNorm(8, 4)
    state = dict(theirs.state_dict())
    state[f'{head}.conv3.weight'] = torch.ones(1)
    ours = nn.Sequential()
    ours.conv1 = ConvWS(3, 8, 3, bias=False, eps_inside_sqrt=inside)
    ours.bcn1 = BCN(8, 4)
    load(ours, state, strict=False)
    warned = [t for level, t in messages if level == 'WARNING']
    if inside == (head == 'fc'):
        assert not warned
    else:
        (text,) = warned
        assert f'eps_inside_sqrt={not inside}) of its weights' in text
        assert 'conv_cfg' in text and text.endswith('(conv1)')


def test_affine_of_groups_into_channels_is_exact(load):
    source = randomized(bcn())
    target = bcn(channel_affine='channel')
    load(target, state_of(source))
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(target(x), source(x), atol=1e-6)
    back = bcn()
    load(back, state_of(target))
    with torch.no_grad():
        assert torch.allclose(back(x), source(x), atol=1e-6)


def test_affine_of_channels_into_groups_warns(load, messages):
    load(bcn(), state_of(gn()))
    ((_, text),) = [m for m in messages if m[0] == 'WARNING']
    assert 'averaged' in text and "channel_affine='channel'" in text


def test_a_summary_says_what_was_taken_and_left(messages):
    state = state_of(bn())
    state['fc.weight'] = torch.zeros(1)
    del state['conv2.weight']
    load_state_dict(bcn(), state)
    (text,) = [t for _, t in messages if t.startswith('Taken')]
    assert 'BN, into the batch part' in text and '3: bn1' not in text
    assert 'bcn1' in text and 'downsample.1' in text
    assert 'Not in the checkpoint: conv2.weight' in text
    assert 'Left in the checkpoint: fc.weight' in text


def test_what_a_gn_checkpoint_needs_is_said(messages):
    bcn(channel_affine='channel').load_state_dict(state_of(gn()))
    ((level, text),) = messages
    assert level == 'INFO' and 'CalibrateEstimatesHook' in text


@pytest.mark.parametrize(
    'make', [bn, lambda: Block('mabn', lambda c: MABN(c, 1, 2))]
)
def test_frozen_layers_without_a_channel_part_warn(messages, make):
    net = bcn()
    net.bcn1.requires_grad_(False)
    net.load_state_dict(state_of(make()))
    ((_, text),) = [m for m in messages if m[0] == 'WARNING']
    assert 'never trained' in text and text.endswith('(bcn1)')
    ((_, text),) = [m for m in messages if m[0] == 'INFO']
    assert '2: bcn2, downsample.1' in text


def test_own_checkpoints_pass_in_silence(load, messages):
    for conv in (nn.Conv2d, ConvWS):
        load(bcn(conv), state_of(randomized(bcn(conv))))
    assert not messages


@pytest.mark.parametrize(
    'trained, loaded, words',
    [
        (ConvWS, nn.Conv2d, 'no scale of their own'),
        (nn.Conv2d, ConvWS, 'lose their mean'),
    ],
)
def test_weights_under_another_convolution_warn(
    load, messages, trained, loaded, words
):
    load(bcn(loaded), state_of(bcn(trained)))
    ((_, text),) = [m for m in messages if m[0] == 'WARNING']
    assert words in text and '3: conv1, conv2, downsample.0' in text


def test_the_authors_weights_in_plain_convolutions_warn(load, messages):
    theirs, ours = nn.Sequential(), nn.Sequential()
    for net, conv, norm in (
        (theirs, authors.Conv2d, authors.BCNorm(8, 4)),
        (ours, nn.Conv2d, BCN(8, 4)),
    ):
        net.conv1, net.bn1 = conv(3, 8, 3, bias=False), norm
        net.last = nn.Conv2d(8, 2, 1)
    load(ours, theirs.state_dict())
    ((_, text),) = [m for m in messages if m[0] == 'WARNING']
    assert 'no scale of their own' in text and text.endswith('(conv1)')


INSIDE = partial(ConvWS, eps_inside_sqrt=True)


@pytest.mark.parametrize(
    'trained, loaded',
    [
        (INSIDE, ConvWS),
        (ConvWS, INSIDE),
        (ConvWS, partial(ConvWS, eps=0.1)),
        (ConvWS, CenConv),
    ],
)
def test_weights_under_another_form_warn(load, messages, trained, loaded):
    net = bcn(loaded)
    load(net, state_of(bcn(trained)))
    ((level, text),) = messages
    assert level == 'WARNING' and '3: conv1, conv2, downsample.0' in text
    function, _, settings = net.conv1.weight_function()
    assert f'with {function.__name__}(' in text
    assert all(f'{k}={v}' in text for k, v in settings.items())


@pytest.mark.parametrize('conv', [INSIDE, CenConv, ConvWN])
def test_weights_under_the_same_form_pass_in_silence(load, messages, conv):
    load(bcn(conv), state_of(bcn(conv)))
    assert not messages


def test_a_record_of_names_alone_is_understood(messages):
    """As checkpoints had it before there were two forms."""
    state = state_of(bcn(ConvWS))
    for metadata in state._metadata.values():
        if RECORD in metadata:
            metadata[RECORD] = list(metadata[RECORD])
    load_state_dict(bcn(ConvWS), state)
    assert not messages
    load_state_dict(bcn(), state)
    assert 'no scale of their own' in messages[0][1]


def network(conv, norm):
    layers = []
    for channels in (3, 64, 64):
        layers += [conv(channels, 64, 3, bias=False), norm(64), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def train(conv):
    """Long enough for the means of filters to grow, or to decay."""
    net = network(conv, lambda c: nn.GroupNorm(4, c))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.03
    )
    images, labels = torch.rand(16, 3, 9, 9), torch.arange(16) % 10
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize('trained', [nn.Conv2d, ConvWS])
@pytest.mark.parametrize('loaded', [nn.Conv2d, ConvWS])
def test_filter_means_tell_where_nothing_is_recorded(
    messages, trained, loaded
):
    state = train(trained)
    del state._metadata
    norm = partial(BCN, num_groups=4, channel_affine='channel')
    network(loaded, norm).load_state_dict(state)
    warned = [t for level, t in messages if level == 'WARNING']
    if trained is loaded:
        assert not warned
    elif loaded is ConvWS:
        assert len(warned) == 1 and 'lose their mean' in warned[0]
    else:
        assert len(warned) == 1 and 'no scale of their own' in warned[0]


def test_a_layer_that_adam_drifted_is_not_judged(messages):
    """As in the last stage of a classifier trained with WS and AdamW."""
    state = dict(network(ConvWS, BCN).state_dict())
    state['6.weight'] = state['6.weight'] + 0.02
    network(ConvWS, BCN).load_state_dict(state)
    assert not [t for level, t in messages if level == 'WARNING']


def test_fresh_weights_are_not_judged(messages):
    for conv in (nn.Conv2d, ConvWS):
        state = dict(network(conv, BCN).state_dict())
        for loaded in (nn.Conv2d, ConvWS):
            network(loaded, BCN).load_state_dict(state)
    assert not [t for level, t in messages if level == 'WARNING']


def test_strict_names_what_is_missing_and_unexpected():
    state = state_of(bn())
    state.pop('bn1.weight')
    with pytest.raises(RuntimeError, match='bcn1'):
        bcn().load_state_dict(state)
    state = state_of(bn())
    state['bn3.weight'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Unexpected.*bn3\.weight'):
        bcn().load_state_dict(state)
    missing, unexpected = bcn().load_state_dict(state, strict=False)
    assert not missing and unexpected == ['bn3.weight']
    # A failed loading leaves nothing behind.
    bcn().load_state_dict(state_of(bn()))


def test_the_checkpoint_itself_is_not_changed(load):
    state = state_of(bn())
    before = {k: v.clone() for k, v in state.items()}
    load(bcn(), state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[k], before[k]) for k in before)


def test_through_files_with_and_without_a_wrapper(tmp_path):
    path = str(tmp_path / 'gn.pth')
    source = gn(ConvWS)
    state = {f'module.{k}': v for k, v in state_of(source).items()}
    torch.save(dict(state_dict=state, meta={}), path)
    x = torch.randn(1, 3, 12, 12)
    target = bcn(ConvWS, channel_affine='channel')
    load_checkpoint(target, path, map_location='cpu')
    assert torch.allclose(target(x), source(x), atol=1e-6)
    wrapped = nn.DataParallel(bcn(ConvWS, channel_affine='channel'))
    wrapped.load_state_dict(state)
    assert torch.allclose(wrapped.module(x), source(x), atol=1e-6)


def test_the_record_survives_a_file(tmp_path, messages):
    path = str(tmp_path / 'bcn.pth')
    state = weights_to_cpu(get_state_dict(bcn(ConvWS)))
    save_checkpoint(dict(state_dict=state, meta={}), path)
    load_checkpoint(bcn(), path, map_location='cpu')
    assert any('no scale of their own' in text for _, text in messages)


def test_copies_and_pickles_still_translate(load):
    for copied in (
        copy.deepcopy(bcn()),
        pickle.loads(pickle.dumps(nn.Sequential(BCN(8, 4)))),
    ):
        if isinstance(copied, Block):
            load(copied, state_of(bn()))
            assert copied.bcn1.batch_weight.ne(1).any()
        assert copied._load_state_dict_pre_hooks
    buffer = io.BytesIO()
    torch.save(nn.Sequential(ConvWS(3, 8, 3), BCN(8, 4)), buffer)
    buffer.seek(0)
    net = torch.load(buffer, weights_only=False)
    net.load_state_dict(nn.Sequential(ConvWS(3, 8, 3), BCN(8)).state_dict())


def test_pretrained_backbone(tmp_path, messages):
    """``init_cfg=Pretrained`` with the prefix of a classifier's backbone."""
    from mmengine.runner.checkpoint import _load_checkpoint_with_prefix

    source = gn(ConvWS)
    path = str(tmp_path / 'classifier.pth')
    state = {f'backbone.{k}': v for k, v in state_of(source).items()}
    state['head.fc.weight'] = torch.zeros(2)
    torch.save(dict(state_dict=state, meta={}), path)
    target = bcn(ConvWS, channel_affine='channel')
    load_state_dict(
        target, _load_checkpoint_with_prefix('backbone.', path), strict=True
    )
    x = torch.randn(1, 3, 12, 12)
    assert torch.allclose(target(x), source(x), atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('norm', [nn.GroupNorm(4, 8), nn.BatchNorm2d(8)])
@pytest.mark.parametrize(
    'make', [lambda: BCN(8, 4), lambda: BGN(8, 4), lambda: MABN(8, 1, 2)]
)
def test_assigned_to_a_layer_without_memory(make, norm, dtype):
    with torch.device('meta'):
        layer = make()
    if isinstance(norm, nn.GroupNorm) and not isinstance(layer, BCN):
        pytest.skip('has no use for it')
    norm = copy.deepcopy(norm).to(dtype)
    layer.load_state_dict(norm.state_dict(), assign=True)
    expected = make().to(dtype)
    expected.load_state_dict(norm.state_dict())
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(
            value, expected.state_dict()[name], check_dtype=False
        )
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(layer.eval()(x), expected.eval()(x))


@pytest.mark.parametrize('eps', [0.0, 1e-5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_the_estimates_that_a_gn_checkpoint_makes_are_not_new(dtype, eps):
    """Though ``1 - eps`` may be 1, as those of a new layer are."""
    norm = BCN(8, 4, eps, 0.05, momentum_annealing=True).to(dtype)
    norm.load_state_dict(nn.GroupNorm(4, 8).to(dtype).state_dict())
    assert norm.num_batches_tracked == 20


def test_estimates_of_a_half_gn_checkpoint_keep_their_digits():
    norm = BCN(8, 4)
    norm.load_state_dict(nn.GroupNorm(4, 8).half().state_dict())
    assert (norm.running_var + norm.eps == 1).all()


@pytest.mark.slow
def test_full_resnet_50_gn_ws():
    """To 1e-6 of the largest output, in float64; float32 rounds more."""
    models = pytest.importorskip('mmdet.models')
    gn_cfg = dict(type='GN', num_groups=32)
    bcn_cfg = dict(type='BCN', channel_affine='channel')
    source, target = (
        models.ResNet(50, norm_cfg=cfg, conv_cfg=dict(type='ConvWS'))
        for cfg in (gn_cfg, bcn_cfg)
    )
    randomized(source)
    target.load_state_dict(source.state_dict())
    for net in (source, target):
        net.double().eval()  # which returns None in mmdet
    x = torch.randn(1, 3, 65, 65, dtype=torch.double)
    with torch.no_grad():
        for a, b in zip(target(x), source(x)):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_hooks_are_there_where_torch_has_no_public_way(monkeypatch):
    """Before torch 2.5."""
    name = 'register_load_state_dict_pre_hook'
    monkeypatch.delattr(nn.Module, name, raising=False)
    source = nn.Sequential()
    source.gn1 = nn.GroupNorm(4, 8)
    target = nn.Sequential()
    target.bcn1 = BCN(8, 4, channel_affine='channel')
    randomized(source)
    target.load_state_dict(source.state_dict(), strict=False)
    torch.testing.assert_close(target.bcn1.weight, source.gn1.weight)


def test_a_big_model_loads_about_as_fast_as_a_plain_one():
    models = pytest.importorskip('mmdet.models')

    def seconds(cfg):
        net = models.ResNet(101, norm_cfg=cfg)
        state = source.state_dict()
        best = 1e9
        for _ in range(3):
            begin = time.process_time()
            net.load_state_dict(state, strict=False)
            best = min(best, time.process_time() - begin)
        return best

    source = models.ResNet(101, norm_cfg=dict(type='BN'))
    plain = seconds(dict(type='BN'))
    assert seconds(dict(type='BCN')) < 4 * plain + 0.2


FAMILY = {
    'BN': lambda: nn.BatchNorm2d(8),
    'GN': lambda: nn.GroupNorm(4, 8),
    'BCN': lambda: BCN(8, 4),
    'BGN': lambda: BGN(8, 4),
    'MABN': lambda: MABN(8, 1, 2),
}


@pytest.mark.parametrize('source', FAMILY)
@pytest.mark.parametrize('target', ['BCN', 'BGN', 'MABN'])
def test_any_normalization_loads_or_says_what_does_not_fit(source, target):
    norm = FAMILY[source]()
    norm(torch.randn(4, 8, 3, 3) * 2 + 1)
    norm.eval()
    other = FAMILY[target]().eval()
    try:
        other.load_state_dict(norm.state_dict(), strict=False)
    except RuntimeError as error:
        assert 'size mismatch' in str(error)
        assert {source, target} <= {'BCN', 'BGN', 'MABN'}
        return
    x = torch.randn(2, 8, 5, 5)
    assert other(x).isfinite().all()
    kept = {('BN', 'BGN'), ('BN', 'MABN'), ('GN', 'BCN')}
    if source == target or (source, target) in kept:
        torch.testing.assert_close(other(x), norm(x))


def test_averages_of_groups_become_those_of_channels():
    norm, other = BGN(8, 4), BCN(8, 4)
    norm(torch.randn(4, 8, 3, 3) * 2 + 1)
    other.load_state_dict(norm.state_dict())
    for name in ('running_mean', 'running_var'):
        group = getattr(norm, name).repeat_interleave(2)
        assert torch.equal(getattr(other, name), group)
