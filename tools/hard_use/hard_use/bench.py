"""Where attacks happen: real runs of the tools, and who survived them."""

import contextlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

import mmengine
import torch
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / 'configs/digits'
# What the tools import, so that a run does not begin with seconds of it.
PRELOADED = [
    'wsbcn_mm.engine.command_line',
    'mmdet.datasets',
    'mmdet.engine',
    'mmdet.evaluation',
    'mmdet.models',
    'mmdet.visualization',
    'onnx',
    'torchvision',
]


class Attack(NamedTuple):
    """A kind of attack, made of many tries.

    Attributes:
        group (str): The heading of the table that it stands below.
        title (str): What is done, for the table.
        run (Callable): Takes a :class:`Bench` and does it.
        slow (bool): Whether it takes longer than some ten seconds.
    """

    group: str
    title: str
    run: Callable
    slow: bool


ATTACKS: List[Attack] = []


def attack(group: str, title: str, slow: bool = False):
    """Put a function into the list of attacks."""

    def register(function):
        ATTACKS.append(Attack(group, title, function, slow))
        return function

    return register


class Run(NamedTuple):
    """What a tool did: its exit status, and all that it printed."""

    code: Optional[int]
    output: str

    def succeeds(self) -> 'Run':
        assert self.code == 0, f'exit status {self.code}:\n{self.tail()}'
        return self

    def refuses(self, *parts: str, lines: int = 6) -> 'Run':
        """Assert that it ended with one message that has these parts."""
        told = re.split('^error: ', self.output, flags=re.MULTILINE)[
            -1
        ].strip()
        assert self.code not in (0, None), 'it was not refused'
        assert 'Traceback' not in self.output, f'a traceback:\n{self.tail()}'
        assert 'error: ' in self.output, f'no message:\n{self.tail()}'
        assert len(told.splitlines()) <= lines, f'too long:\n{told}'
        for part in parts:
            assert re.search(part, told), f'{part!r} is not in {told!r}'
        return self

    def says(self, part: str, times: Optional[int] = None) -> 'Run':
        found = len(re.findall(part, self.output))
        assert found, f'{part!r} was never said:\n{self.tail()}'
        assert times in (None, found), f'{part!r} was said {found} times'
        return self

    def tail(self, lines: int = 12) -> str:
        return '\n'.join(self.output.splitlines()[-lines:])


class Process:
    """A tool that runs, in a process group of its own."""

    def __init__(self, tool: str, arguments: list, output: Path, environment):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(PRELOADED)
        self._output = output
        self._process = context.Process(
            target=_become,
            args=(
                str(ROOT / 'tools' / tool),
                [str(argument) for argument in arguments],
                str(output),
                environment,
            ),
        )
        self._process.start()
        self.begin = time.monotonic()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> Run:
        """End it as the out-of-memory killer does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # before it has made its group
        return self.wait()

    def wait(self, timeout: float = 180) -> Run:
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise AssertionError(f'it hung for {timeout} s')
        text = self._output.read_text(errors='replace')
        return Run(self._process.exitcode, text)


def _become(tool: str, arguments: List[str], output: str, environment: dict):
    """Be the tool: what it prints goes to a file."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    limit = environment.get('HARD_USE_FILE_SIZE')
    if limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
    # MMEngine lays out the text of a config four times, of which each takes
    # a second: most of a run this small.
    mmengine.config.config.FormatCode = lambda text, **_: (text, True)
    sys.argv = [tool, *arguments]
    sys.path[0] = os.path.dirname(tool)
    sys.path[1:1] = environment.get('PYTHONPATH', '').split(os.pathsep)
    runpy.run_path(tool, run_name='__main__')


class Bench:
    """A folder for an attack, and the count of what became of its tries.

    Args:
        folder (Path): Emptied first; anything may be left in there.
        scenes (Path): Digit scenes to train on.
        scale (int): How often what is random is tried. Default: 1
        tell (Callable): Gets a line for each try.
    """

    def __init__(
        self,
        folder: Path,
        scenes: Path,
        scale: int = 1,
        tell=lambda line: None,
    ):
        self.folder, self.scenes, self.scale = folder, scenes, scale
        self._tell = tell or (lambda line: None)
        self._runs = 0
        self.tried: List[str] = []
        self.lost: List[tuple] = []
        self.notes: List[str] = []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    @contextlib.contextmanager
    def survives(self, what: str) -> Iterator[None]:
        """A try: what is asserted inside must hold."""
        self.tried.append(what)
        begin = time.monotonic()
        try:
            yield
        except Exception as error:
            if not isinstance(error, AssertionError):
                error = traceback.format_exc()
            self.lost.append((what, str(error)[-1500:]))
        lost = self.lost and self.lost[-1][0] == what
        self._tell(
            f'  {"LOST" if lost else "ok  "} {what} '
            f'({time.monotonic() - begin:.1f} s)'
        )

    def start(self, tool: str, *arguments, **environment: str) -> Process:
        """Start a tool, such as ``'train.py'``."""
        self._runs += 1
        output = self.folder / f'output_{self._runs}.txt'
        return Process(tool, list(arguments), output, environment)

    def run(self, tool: str, *arguments, **environment: str) -> Run:
        return self.start(tool, *arguments, **environment).wait()

    def config(
        self, text: str = '', name: str = 'user.py', norm: str = 'bcn-ws'
    ) -> Path:
        """Write a user's config: the digits one, with these lines added."""
        scenes, path = f'{self.scenes}/', self.folder / name
        path.write_text(
            f"""_base_ = {str(_flat_config(self.folder, norm))!r}
train_dataloader = dict(dataset=dict(data_root={scenes!r}))
test_dataloader = dict(dataset=dict(data_root={scenes!r}))
test_evaluator = dict(ann_file={scenes!r} + 'annotations/instances_val.json')
val_dataloader = val_cfg = val_evaluator = None
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
custom_hooks = [
    dict(type='SyncEstimatesHook'),
    dict(type='ExactResumeHook'),
]
{text}
"""
        )
        return path

    def train(self, config: Path, work_dir: Path, *more, **environment) -> Run:
        return self.run(
            'train.py', config, '--work-dir', work_dir, *more, **environment
        )


def _flat_config(folder: Path, norm: str) -> Path:
    """A config of the digits in one file, which is read sooner."""
    path = folder / f'digits_{norm}.py'
    if not path.exists():
        name = f'mask-rcnn_r18-slim_fpn_{norm}_1xb1-5e_digits.py'
        Config.fromfile(str(DIGITS / name)).dump(str(path))
    return path


def make_scenes(folder: Path, num_train: int = 3) -> Path:
    """Few and small digit scenes, made once."""
    if not (folder / 'manifest.json').exists():
        output = folder.with_suffix('.txt')
        output.parent.mkdir(parents=True, exist_ok=True)
        arguments = [
            f'--out={folder}',
            f'--num-train={num_train}',
            '--num-val=2',
            '--image-size=64',
        ]
        tool = 'dataset_converters/digit_scenes.py'
        Process(tool, arguments, output, {}).wait().succeeds()
    return folder


def edit_annotations(scenes: Path, out: Path, change: Callable) -> Path:
    """A copy of the scenes whose training annotations are changed."""
    shutil.copytree(scenes, out)
    path = out / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return out


def weights(path: Path) -> dict:
    """The tensors of a checkpoint, its estimates among them."""
    from wsbcn_mm.engine.checkpoint import read_state_dict

    return read_state_dict(str(path))


def assert_equal_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys(), 'other tensors'
    other = [key for key in a if not torch.equal(a[key], b[key])]
    assert not other, f'{len(other)} of {len(a)} differ, such as {other[0]}'
