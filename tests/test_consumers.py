import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wsbcn_mm.consumers import record_consumers


class Net(nn.Module):
    """A convolution, what is done with its output, and a normalization."""

    def __init__(self, between=None, beside=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.between = between or (lambda x: x)
        self.beside = beside or (lambda x: x.shape)

    def forward(self, x):
        x = self.conv(x)
        self.beside(x)
        return self.norm(self.between(x))


def record(net, *args):
    with torch.no_grad(), record_consumers(net) as consumers:
        net.eval()(*(args or (torch.randn(2, 3, 8, 8),)))
    return consumers


@pytest.mark.parametrize(
    'between',
    [
        lambda x: x,
        F.relu,
        lambda x: F.relu(x, inplace=True),
        lambda x: F.max_pool2d(x, 2),
        lambda x: torch.cat(x.chunk(2, 1), 1),
        lambda x: x.flatten(2).unflatten(2, (6, 6)),
        lambda x: x.flip(0)[:, :8] if x.dim() == 5 else x[:, :8],
        lambda x: F.interpolate(x, scale_factor=2.0),
        lambda x: x.mean((2, 3), keepdim=True),
    ],
)
def test_scale_goes_through_what_leaves_it_alone(between):
    net = Net(between)
    consumers = record(net)
    assert consumers.only_normalizations(net.conv)
    assert consumers.sources[net.norm] == {net.conv}


@pytest.mark.parametrize(
    'between, name',
    [
        (torch.sigmoid, 'sigmoid'),
        (F.silu, 'silu'),
        (lambda x: x + 1, 'add'),
        (lambda x: x * x, 'mul'),
    ],
)
def test_scale_ends_in_what_depends_on_it(between, name):
    net = Net(between)
    consumers = record(net)
    assert not consumers.only_normalizations(net.conv)
    assert consumers.others[net.conv] == {name}
    assert consumers.sources[net.norm] == set()


def test_second_consumer_is_seen():
    net = Net(beside=lambda x: x.exp())
    consumers = record(net)
    assert consumers.norms[net.conv] == {net.norm}
    assert not consumers.only_normalizations(net.conv)


def test_looking_at_a_shape_is_not_consuming():
    net = Net(beside=lambda x: (x.shape, x.size(0), x.dim(), x.device))
    assert record(net).only_normalizations(net.conv)


def test_assignment_into_a_tensor_hands_on():
    def between(x):
        y = x.new_empty(x.shape)
        y[:, :] = x
        return y

    net = Net(between)
    assert record(net).only_normalizations(net.conv)


def test_output_of_the_network_and_of_another_convolution():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    consumers = record(net)
    assert consumers.others[net[0]] == {'the convolution 1'}
    assert consumers.others[net[1]] == {"the network's output"}


def test_a_convolution_that_did_not_run_is_not_known():
    net = Net()
    net.unused = nn.Conv2d(3, 8, 1)
    assert not record(net).only_normalizations(net.unused)


def test_one_convolution_two_normalizations():
    net = nn.ModuleDict(
        dict(
            conv=nn.Conv2d(3, 8, 1), a=nn.BatchNorm2d(8), b=nn.GroupNorm(2, 8)
        )
    )
    net.forward = lambda x: net['a'](net['conv'](x)) + net['b'](net['conv'](x))
    consumers = record(net)
    assert consumers.only_normalizations(net['conv'])
    assert consumers.norms[net['conv']] == {net['a'], net['b']}


def test_normalizations_know_their_input():
    net = Net()
    assert record(net).shapes == {net.norm: (2, 8, 6, 6)}


def test_hooks_are_gone_afterwards_even_after_an_error():
    net = Net(lambda x: x[:, :3])
    with pytest.raises(RuntimeError):
        record(net)
    assert not net.conv._forward_hooks and not net.norm._forward_pre_hooks
