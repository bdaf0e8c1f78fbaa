"""Hooks of other libraries that look for Batch Normalizations."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from wsbcn_mm import BCN, BGN, MABN, SyncBCN

KINDS = {
    'BN': lambda: nn.BatchNorm2d(8),
    'BCN': lambda: BCN(8, 4, momentum=0.5),
    'BCN-batch': lambda: BCN(8, 4, momentum=0.5, estimate=False),
    'SyncBCN': lambda: SyncBCN(8, 4, momentum=0.5),
    'BGN': lambda: BGN(8, 4),
    'MABN': lambda: MABN(8, batch_size=2, simulated_batch_size=4),
}


def _after_sync_norm_hook(kind):
    from mmdet.engine.hooks import SyncNormHook

    torch.manual_seed(dist.get_rank())
    net = nn.Sequential(KINDS[kind](), nn.Conv2d(8, 8, 1))
    for _ in range(3):
        net(torch.randn(2, 8, 5, 5) + dist.get_rank())
    with torch.no_grad():  # as if the processes trained apart
        net[0].weight.add_(dist.get_rank())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    SyncNormHook().before_val_epoch(SimpleNamespace(model=net))
    y = net.eval()(torch.ones(1, 8, 4, 4))
    return before, net.state_dict(), y


@pytest.mark.parametrize('kind', KINDS)
def test_sync_norm_hook_averages_what_a_layer_learned(processes, kind):
    """mmdet's hook before validation, as YOLOX has it."""
    (before, after, y), (other, theirs, _) = processes.run(
        _after_sync_norm_hook, [kind, kind]
    )
    assert y.isfinite().all()
    for name, value in after.items():
        if not name.startswith('0.'):
            assert torch.equal(value, before[name])
            continue
        assert torch.equal(value, theirs[name]), name
        if value.is_floating_point():
            mean = (before[name] + other[name]) / 2
            torch.testing.assert_close(value, mean)
