"""Two processes below torchrun, on a CPU, and the death of one of them."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from .bench import (
    ROOT,
    Bench,
    Run,
    assert_equal_bits,
    attack,
    make_scenes,
    weights,
)

GROUP = 'Two processes'
# In a module of the user's, which every process imports.
RANKS = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveRank(Hook):
    priority = 'LOWEST'

    def after_train(self, runner):
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        path = f'{runner.work_dir}/rank_{get_rank()}.pth'
        torch.save(dict(state_dict=model.state_dict()), path)
"""
# Nothing is drawn at random: all anchors and proposals are trained on.
CONFIG = """
from wsbcn_mm import micro_batch_model
custom_imports = dict(imports=['wsbcn_mm', 'ranks'])
train_cfg = dict(max_epochs={epochs})
train_dataloader.update(batch_size={batch_size})
param_scheduler = []
optim_wrapper = dict(
    clip_grad=None,
    optimizer=dict(_delete_=True, type='SGD', lr={lr}),
)
custom_hooks = [dict(type=name) for name in {hooks!r}]
model = micro_batch_model(
    _base_.model,
    norm_cfg=dict({norm!r}, num_groups=4),
    images_per_gpu=2,
    images_per_update=2,
)
for part in ('rpn', 'rcnn'):
    model['train_cfg'][part]['sampler'].update(num=100000)
"""


def two_processes(bench: Bench, config: Path, work_dir: Path, *more):
    """Start ``tools/dist_train.sh`` with two processes."""
    (bench.folder / 'ranks.py').write_text(RANKS)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    output = bench.folder / f'{work_dir.name}.txt'
    with open(output, 'w') as file:
        process = subprocess.Popen(
            ['bash', str(ROOT / 'tools/dist_train.sh'), str(config), '2']
            + ['--work-dir', str(work_dir), *more],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=dict(
                os.environ,
                PYTHON=sys.executable,
                PORT=str(port),
                PYTHONPATH=f'{ROOT}{os.pathsep}{bench.folder}',
                OMP_NUM_THREADS='1',
                CUDA_VISIBLE_DEVICES='',
            ),
        )
    return process, output


def finished(process, output: Path, timeout: float = 240) -> Run:
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f'it hung for {timeout:.0f} s') from None
    return Run(code, output.read_text(errors='replace'))


def config_for(bench: Bench, name: str, **settings) -> Path:
    settings = dict(
        dict(epochs=1, batch_size=1, lr=0.0, hooks=[], norm=dict(type='BCN')),
        **settings,
    )
    return bench.config(CONFIG.format(**settings), f'{name}.py', 'bn')


def ranks(work_dir: Path) -> list:
    return [weights(work_dir / f'rank_{rank}.pth') for rank in (0, 1)]


def difference(a: dict, b: dict, part: str) -> float:
    """Of the estimates of some layers, as a share of how far they moved."""
    apart = moved = 0.0
    for key, value in a.items():
        for name, start in (('running_mean', 0), ('running_var', 1)):
            if key.startswith(part) and key.endswith(name):
                apart += (value - b[key]).square().sum().item()
                moved += (value - start).square().sum().item()
    return math.sqrt(apart / moved)


@attack(GROUP, 'Mask R-CNN against one process with all images', slow=True)
def equal(bench: Bench) -> None:
    # As many images for each process.
    bench.scenes = make_scenes(bench.folder / 'scenes', num_train=4)
    for name, settings, limits in (
        ('SyncBCN', dict(norm=dict(type='SyncBCN')), {'': 1e-3}),
        (
            'SyncEstimatesHook',
            dict(
                hooks=['SyncEstimatesHook'],
                norm=dict(type='BCN', momentum=0.02),
            ),
            # A step normalizes with a process's own update, of this rate.
            {'backbone.bcn1': 1e-4, 'backbone': 0.1},
        ),
    ):
        one = config_for(bench, f'{name}_one', batch_size=2, **settings)
        two = config_for(
            bench,
            f'{name}_two',
            **dict(settings, hooks=[*settings.get('hooks', []), 'SaveRank']),
        )
        work_dir = bench.folder / f'{name}_two'
        (bench.folder / 'ranks.py').write_text(RANKS)
        expected_dir = bench.folder / f'{name}_one'
        path = f'{bench.folder}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
        with bench.survives(f'{name}: two processes train'):
            finished(*two_processes(bench, two, work_dir)).succeeds()
        with bench.survives(f'{name}: both have the same weights, estimates'):
            assert_equal_bits(*ranks(work_dir))
        with bench.survives(f'{name}: equal to one process'):
            bench.train(one, expected_dir, PYTHONPATH=path).succeeds()
            a = weights(work_dir / 'epoch_1.pth')
            b = weights(expected_dir / 'epoch_1.pth')
            for part, limit in limits.items():
                apart = difference(a, b, part)
                bench.notes.append(
                    f'{name}, {part or "all"}: differs by {apart:.1e}'
                )
                assert apart < limit, f'{part} differs by {apart}'


@attack(GROUP, 'one of them is killed, and the run resumed', slow=True)
def one_killed(bench: Bench) -> None:
    hooks = ['SyncEstimatesHook', 'ExactResumeHook', 'SaveRank']
    config = config_for(bench, 'config', epochs=3, lr=0.01, hooks=hooks)
    whole, broken = bench.folder / 'whole', bench.folder / 'broken'
    with bench.survives('the unbroken run'):
        finished(*two_processes(bench, config, whole)).succeeds()
    with bench.survives('rank 1 is killed: all end within a minute'):
        process, output = two_processes(bench, config, broken)
        while not (broken / 'epoch_1.pth').exists():
            assert process.poll() is None, output.read_text()[-2000:]
            time.sleep(0.02)
        os.kill(_process_of_rank(process.pid, 1), signal.SIGKILL)
        run = finished(process, output, timeout=60)
        assert run.code != 0, 'the script says that all is well'
        run.says('SIGKILL|Signal 9')
    with bench.survives('--resume: the same weights, bit for bit'):
        finished(
            *two_processes(bench, config, broken, '--resume')
        ).succeeds().says(r'resumed epoch: \d')
        assert_equal_bits(*ranks(broken))
        assert_equal_bits(
            weights(whole / 'epoch_3.pth'), weights(broken / 'epoch_3.pth')
        )
    with bench.survives('a mistake in the config ends both with its message'):
        bad = bench.config(
            'model = dict(backbone=dict(norm_cfg=dict(num_group=2)))', 'bad.py'
        )
        run = finished(*two_processes(bench, bad, bench.folder / 'bad'), 120)
        assert run.code != 0
        run.says("error: the config: .*'num_group'")


def _process_of_rank(torchrun: int, rank: int) -> int:
    """The process of a rank, among the children of torchrun."""
    for status in Path('/proc').glob('[0-9]*/status'):
        try:
            parent = int(re.search(r'PPid:\s*(\d+)', status.read_text())[1])
            environment = (status.parent / 'environ').read_bytes()
        except (OSError, TypeError):  # it has ended
            continue
        if parent == torchrun and f'\0RANK={rank}\0'.encode() in environment:
            return int(status.parent.name)
    raise AssertionError(f'rank {rank} is not running')
