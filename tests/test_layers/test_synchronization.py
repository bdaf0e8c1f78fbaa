"""Does a training wait for the accelerator, or the accelerator for it?

Tensors without data, as those of the meta device, have nothing to wait for:
whoever looks at a number raises. What brings numbers there from a list would
copy them to an accelerator, and wait until they are there.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from wsbcn_mm import (
    BCN,
    BGN,
    MABN,
    CenConv,
    ConvCWN,
    ConvWN,
    ConvWS,
    SyncBCN,
)

CONVERT = nn.SyncBatchNorm.convert_sync_batchnorm
FROM_A_LIST = (
    torch.tensor,
    torch.as_tensor,
    torch.Tensor.new_tensor,
    torch.Tensor.to,
    torch.Tensor.copy_,
)


class NothingIsCopiedThere(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in FROM_A_LIST and result.is_meta:
            source = args[1] if function is torch.Tensor.copy_ else args[0]
            is_there = isinstance(source, torch.Tensor) and source.is_meta
            if function is torch.Tensor.new_tensor or not is_there:
                raise RuntimeError(f'{function.__name__} waits')
        return result


def norms():
    for norm in (BCN, SyncBCN):
        for arguments in (
            dict(momentum_annealing=True),
            dict(momentum=None),
            dict(estimate=False),
        ):
            yield norm(8, 4, **arguments)
    for norm in (BGN(8, 4), MABN(8, 2, 16)):
        yield norm
        yield CONVERT(nn.Sequential(copy.deepcopy(norm)))[0]


def convs():
    for conv in (ConvWS, CenConv, ConvWN, ConvCWN):
        yield conv(8, 8, 3)


def name(layer):
    return str(layer).replace('\n', '')


@pytest.mark.parametrize('layer', [*norms(), *convs()], ids=name)
@pytest.mark.parametrize('processes', [1, 2])
def test_training_waits_for_nothing(layer, processes, monkeypatch):
    if processes > 1:
        monkeypatch.setattr(dist, 'is_initialized', lambda: True)
        monkeypatch.setattr(dist, 'get_world_size', lambda group: processes)
        monkeypatch.setattr(dist, 'get_rank', lambda group: 0)
        monkeypatch.setattr(dist, 'all_gather', lambda *_, group: None)
        monkeypatch.setattr(dist, 'all_reduce', lambda *_, group: None)
        if hasattr(layer, 'synchronize'):
            layer.synchronize(object())
    layer = layer.to('meta')
    x = torch.empty(2, 8, 5, 5, device='meta', requires_grad=True)
    with NothingIsCopiedThere():
        for _ in range(2):
            layer(x).sum().backward()
    assert x.grad.is_meta


@pytest.mark.parametrize(
    'waits',
    [
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device='meta'),
        lambda x: x.copy_(torch.ones(1)),
        lambda x: torch.ones(1).to('meta'),
        lambda x: x.item(),
        lambda x: bool(x > 1),
    ],
)
def test_what_waits_is_seen(waits):
    x = torch.empty(1, device='meta')
    with NothingIsCopiedThere(), pytest.raises(RuntimeError):
        waits(x)
