"""Runs that are killed, that find no space, or nowhere to write."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Iterator

from wsbcn_mm.engine.checkpoint import read_checkpoint

from .bench import Bench, assert_equal_bits, attack, weights

GROUP = 'Interruptions'
EPOCHS = 4
CONFIG = f"""
train_cfg = dict(max_epochs={EPOCHS})
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
"""


def checkpoints(work_dir: Path) -> list:
    """The epochs of the checkpoints that are there; all can be read."""
    epochs = []
    for path in work_dir.glob('epoch_*.pth'):
        read_checkpoint(str(path))  # raises if it is not whole
        epochs.append(int(re.search(r'\d+', path.name)[0]))
    return sorted(epochs)


def whole_run(bench: Bench) -> tuple:
    """A config, its last weights where nothing goes wrong, and its seconds."""
    config = bench.config(CONFIG)
    begin = time.monotonic()
    bench.train(config, bench.folder / 'whole').succeeds()
    seconds = time.monotonic() - begin
    return config, weights(last(bench.folder / 'whole')), seconds


def last(work_dir: Path) -> Path:
    return work_dir / f'epoch_{EPOCHS}.pth'


def finish(bench: Bench, config: Path, work_dir: Path, expected: dict) -> None:
    bench.train(config, work_dir, '--resume').succeeds()
    assert_equal_bits(expected, weights(last(work_dir)))


@attack(GROUP, 'kill -9 at a random moment, one checkpoint kept', slow=True)
def killed(bench: Bench) -> None:
    config, expected, seconds = whole_run(bench)
    moments = random.Random(0)
    work_dir, saved = bench.folder / 'killed', 0
    for _ in range(4 * bench.scale):
        moment = moments.uniform(0.2, 1) * seconds
        with bench.survives(f'killed after {moment:.2f} s of {seconds:.2f} s'):
            process = bench.start(
                'train.py', config, '--work-dir', work_dir, '--resume'
            )
            time.sleep(moment)
            process.kill()
            epochs = checkpoints(work_dir)
            newest = epochs[-1] if epochs else 0
            assert newest >= saved, f'epoch {saved} was saved, and is lost'
            saved = newest
        if saved == EPOCHS:  # begin anew
            work_dir, saved = Path(f'{work_dir}_again'), 0
    with bench.survives('resumed to the end: the same weights, bit for bit'):
        finish(bench, config, work_dir, expected)


@attack(GROUP, 'kill -9 while a checkpoint is written', slow=True)
def killed_in_write(bench: Bench) -> None:
    config, expected, _ = whole_run(bench)
    work_dir = bench.folder / 'killed'
    for epoch in range(1, 3 + bench.scale):
        epoch = min(epoch, EPOCHS)
        with bench.survives(f'killed while epoch {epoch} is written'):
            process = bench.start(
                'train.py', config, '--work-dir', work_dir, '--resume'
            )
            size = _wait_for_write(work_dir / f'epoch_{epoch}.pth', process)
            process.kill()
            epochs = checkpoints(work_dir)
            assert epochs and epochs[-1] >= epoch - 1 or epoch == 1, (
                f'epoch {epoch - 1} was saved, and is lost'
            )
            bench.notes.append(f'{size} bytes were written')
        with bench.survives(f'resumed from before epoch {epoch}'):
            stop = f'train_cfg.max_epochs={epoch}'
            bench.train(
                config, work_dir, '--resume', '--cfg-options', stop
            ).succeeds()
            assert checkpoints(work_dir)[-1] == epoch
    with bench.survives('resumed to the end: the same weights, bit for bit'):
        finish(bench, config, work_dir, expected)


def _wait_for_write(path: Path, process) -> int:
    """Wait until a checkpoint is there in part; return its size."""
    unfinished = Path(f'{path}.unfinished')
    while process.running:
        for candidate in (unfinished, path):
            with contextlib.suppress(FileNotFoundError):
                return candidate.stat().st_size
        time.sleep(0.0005)
    raise AssertionError('the run ended before')


@attack(GROUP, 'the last checkpoint is damaged, and --resume', slow=True)
def damaged(bench: Bench) -> None:
    config = bench.config(
        f'train_cfg = dict(max_epochs={EPOCHS})\n'
        'default_hooks = dict(checkpoint=dict(max_keep_ckpts=-1))\n'
    )
    whole = bench.folder / 'whole'
    bench.train(config, whole).succeeds()
    expected = weights(last(whole))
    content = last(whole).read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 255
    for what, part in (
        ('truncated', content[: len(content) // 3]),
        ('empty', b''),
        ('with one byte changed', bytes(changed)),
    ):
        with bench.survives(f'the last checkpoint is {what}'):
            last(whole).write_bytes(part)
            finish_from(bench, config, whole, expected, EPOCHS - 1)
    with bench.survives('last_checkpoint names a file that is gone'):
        last(whole).unlink()
        finish_from(bench, config, whole, expected, EPOCHS - 1)
    with bench.survives('last_checkpoint is empty'):
        (whole / 'last_checkpoint').write_text('')
        last(whole).unlink()
        bench.train(config, whole, '--resume').succeeds()
        assert_equal_bits(expected, weights(last(whole)))
    with bench.survives('every checkpoint is truncated'):
        for path in whole.glob('epoch_*.pth'):
            path.write_bytes(content[:1000])
        bench.train(config, whole, '--resume').refuses(
            'no checkpoint', 'epoch_1.pth', lines=EPOCHS + 2
        )


def finish_from(bench, config, work_dir, expected, epoch: int) -> None:
    run = bench.train(config, work_dir, '--resume').succeeds()
    run.says('Not resumed from the last checkpoint: ', times=1)
    run.says(f'resumed epoch: {epoch}')
    assert_equal_bits(expected, weights(last(work_dir)))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of some bytes at a folder; False where it cannot be mounted."""
    folder.mkdir(parents=True)
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder]
    mounted = (
        shutil.which('mount')
        and not subprocess.run(mount, capture_output=True).returncode
    )
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(['umount', '-l', folder], check=True)


@attack(GROUP, 'the disk is full', slow=True)
def full_disk(bench: Bench) -> None:
    config, expected, _ = whole_run(bench)
    size = last(bench.folder / 'whole').stat().st_size
    disk = bench.folder / 'disk'
    with small_disk(disk, int(1.6 * size)) as mounted:
        bench.notes.append(
            'a small tmpfs' if mounted else 'a limit of the size of a file'
        )
        work_dir = disk / 'run'
        first = ['--cfg-options', 'train_cfg.max_epochs=1']
        if mounted:
            # Room for one checkpoint, but not for two.
            bench.train(config, work_dir, *first).succeeds()
            limit = {}
        else:
            bench.train(config, work_dir, *first).succeeds()
            limit = dict(HARD_USE_FILE_SIZE=str(size // 2))
        with bench.survives('full while a checkpoint is written'):
            run = bench.train(config, work_dir, '--resume', **limit)
            run.refuses('no space', 'epoch_2.pth', '--resume')
            assert checkpoints(work_dir) == [1], 'epoch 1 was lost'
            assert not list(work_dir.glob('*.unfinished')), 'a part was left'
        with bench.survives('with space again: resumed, bit for bit'):
            roomy = bench.folder / 'roomy'
            shutil.copytree(work_dir, roomy)
            finish(bench, config, roomy, expected)
        if mounted:
            with bench.survives('full before a run begins'):
                with open(disk / 'filler', 'wb') as file:
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(65536))
                            file.flush()
                bench.train(config, work_dir, '--resume').refuses(
                    '[Nn]o space'
                )
                assert checkpoints(work_dir) == [1], 'epoch 1 was lost'
            for name, command in _writers(config, work_dir, disk).items():
                with bench.survives(f'full for {name}'):
                    bench.run(*command).refuses('[Nn]o space')


def _writers(config: Path, work_dir: Path, out: Path) -> dict:
    """The tools that write a checkpoint, as command lines."""
    path = work_dir / 'epoch_1.pth'
    return {
        'publish.py': [
            'model_converters/publish.py',
            path,
            out / 'published',
        ],
        'backbone.py': [
            'model_converters/backbone.py',
            path,
            out / 'backbone',
        ],
        'normalization.py': [
            'model_converters/normalization.py',
            config,
            path,
            out / 'converted',
        ],
        'fold.py': ['deploy/fold.py', config, path, out / 'folded'],
    }


@attack(GROUP, 'nowhere to write', slow=True)
def unwritable(bench: Bench) -> None:
    config, file = bench.config(), bench.folder / 'a_file'
    file.write_text('')
    places = {'a file in its place': file, 'below a file': file / 'below'}
    read_only = bench.folder / 'read_only'
    with small_disk(read_only, 65536) as mounted:
        if mounted:
            remount = ['mount', '-o', 'remount,ro', read_only]
            subprocess.run(remount, check=True)
            places['a disk mounted read-only'] = read_only / 'run'
            bench.notes.append('a tmpfs mounted read-only')
        elif os.getuid():
            read_only.chmod(0o500)
            places['a folder without permission'] = read_only / 'run'
            bench.notes.append('a folder without permission to write')
        good = bench.folder / 'once'
        bench.train(
            config, good, '--cfg-options', 'train_cfg.max_epochs=1'
        ).succeeds()
        for what, place in places.items():
            name = re.escape(str(place))
            with bench.survives(f'{what}: train.py'):
                bench.train(config, place).refuses(name, '--work-dir')
            with bench.survives(f'{what}: test.py'):
                path = good / 'epoch_1.pth'
                bench.run(
                    'test.py', config, path, '--work-dir', place
                ).refuses(name, '--work-dir')
            for tool, command in _writers(config, good, place).items():
                with bench.survives(f'{what}: {tool}'):
                    bench.run(*command).refuses(name)
