"""Our layers where FSDP shards a model, and wraps each Batch Normalization."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import BCN, BGN, MABN, ConvWS, SyncBCN

DTYPES = {
    'params': dict(param_dtype=torch.bfloat16),
    'params_and_buffers': dict(
        param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
    ),
    'float32_buffers': dict(
        param_dtype=torch.bfloat16, buffer_dtype=torch.float32
    ),
}


def train(rank, dtypes, norm_eval):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(ConvWS(3, 8, 3), SyncBCN(8, 4, momentum=0.1)),
        nn.Sequential(
            ConvWS(8, 8, 3), BCN(8, 4, momentum=0.1, grad_averaging=4)
        ),
        nn.Sequential(nn.Conv2d(8, 8, 3), BGN(8, 4)),
        nn.Sequential(nn.Conv2d(8, 8, 1), MABN(8, 2, 4)),
    )
    network = FullyShardedDataParallel(
        network,
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        mixed_precision=MixedPrecision(**dtypes),
        device_id=torch.device('cpu'),
        use_orig_params=True,
    )
    if norm_eval:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        x = torch.randn(2, 3, 12, 12, generator=generator) + rank
        network(x).float().square().mean().backward()
        optimizer.step()
    return {name: b.clone() for name, b in network.named_buffers()}


@pytest.mark.parametrize('dtypes', DTYPES)
def test_statistics_are_shared_or_own(processes, dtypes):
    first, second = processes.run(
        train, [0, 1], [DTYPES[dtypes]] * 2, [False] * 2
    )
    for name, buffer in first.items():
        if 'num_batches_tracked' in name:
            assert buffer == second[name] == 3
        elif 'grad_images' in name:
            assert buffer.tolist() == [2, 4, 6]
        elif 'running_var' in name:
            assert buffer.dtype == torch.float32
            is_synchronized = name.startswith('_fsdp_wrapped_module.0')
            assert torch.equal(buffer, second[name]) == is_synchronized


def test_norm_eval_stops_them(processes):
    for buffers in processes.run(
        train, [0, 1], [DTYPES['float32_buffers']] * 2, [True] * 2
    ):
        for name, buffer in buffers.items():
            if 'num_batches_tracked' in name:
                assert buffer == 0
