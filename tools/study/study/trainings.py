"""Train and test whole configs in processes of their own, with progress."""

import glob
import json
import os
import os.path as osp
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Callable, List, Optional

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from .cells import cell_name
from .comparison import (
    CellStore,
    Comparison,
    in_points,
    metric_name,
    metrics_of,
)
from .environment import environment
from .runs import _finite

TOOLS = osp.abspath(osp.join(osp.dirname(__file__), osp.pardir, osp.pardir))
ETA = re.compile(r'eta: (?:(\d+) days?, )?(\d+):(\d+):(\d+)')
ERROR = re.compile(
    r'(?:\[rank\d+\]: )?((?:[\w.]*(?:Error|Exception)|error|usage)\b.*)'
)


class Stopped(Exception):
    """A cell was interrupted: it is to go on, and is no failure."""


def gpu_slots(gpus: Optional[List[str]], each: int, workers: Optional[int]):
    """Return what trainings that run at once are to see of the GPUs.

    Args:
        gpus (list[str] | None): Their identifiers. None: all there are.
        each (int): GPUs of one training.
        workers (int | None): Trainings at once. None: as many as there are
            GPUs for, and one where there is none.

    Returns:
        list[str | None]: A ``CUDA_VISIBLE_DEVICES`` for each; None on a CPU.
    """
    if gpus is None:
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        gpus = [str(i) for i in range(torch.cuda.device_count())]
        if gpus and visible:
            gpus = visible.split(',')
    sets = [
        ','.join(gpus[i : i + each])
        for i in range(0, len(gpus) - each + 1, each)
    ] or [None]
    return [sets[i % len(sets)] for i in range(workers or len(sets))]


class Training:
    """One cell: a config, trained with tools/train.py and tested.

    Its folder gets ``config.py``, ``log.txt``, checkpoints, and at the end
    ``record.json``. Run again after an interruption, it goes on at the last
    checkpoint.

    Args:
        cell (dict): Its settings.
        comparison (Comparison): Where its config comes from.
        store (CellStore): Where its folder is.
    """

    def __init__(self, cell: dict, comparison: Comparison, store: CellStore):
        self.cell = cell
        self.comparison = comparison
        self.store = store
        self.folder = store.cell_folder(cell)
        self.log = osp.join(self.folder, 'log.txt')
        self.started = None

    def run(self, slot: Optional[str], threads: int, stop, lock: int) -> dict:
        """Train, test, and write the record, a failure included.

        Args:
            slot (str | None): The GPUs to use.
            threads (int): CPU threads.
            stop (threading.Event): Set to interrupt.
            lock (int): A file that stays open as long as a process runs.

        Raises:
            Stopped: If it was interrupted.
        """
        if stop.is_set():
            raise Stopped
        self.started = time.time()
        record = dict(settings=self.cell)
        try:
            metrics = self._train_and_test(slot, threads, stop, lock)
            record['result'] = _finite(metrics)
        except Stopped:
            raise
        except Exception as error:  # a row of the table, not the end
            record['error'] = str(error)
        record['seconds'] = round(time.time() - self.started, 1)
        record['environment'] = environment()
        self.store.write(record)
        return record

    def seconds_left(self) -> Optional[float]:
        """Return what MMEngine's log says is left of the training."""
        if self.started is None:
            return None
        found = ETA.findall(_tail(self.log))
        if not found:
            return None
        days, hours, minutes, seconds = (int(n or 0) for n in found[-1])
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def _train_and_test(self, slot, threads, stop, lock) -> dict:
        os.makedirs(self.folder, exist_ok=True)
        config = osp.join(self.folder, 'config.py')
        trained = osp.join(self.folder, 'trained')
        last = osp.join(self.folder, 'last_checkpoint')
        env = dict(os.environ)
        env.setdefault('OMP_NUM_THREADS', str(threads))
        if slot is not None:
            env['CUDA_VISIBLE_DEVICES'] = slot

        def call(tool: str, *arguments: str) -> None:
            self.comparison.config(self.cell).dump(config)
            command = [sys.executable]
            options = ['--work-dir']
            gpus = self.comparison.gpus
            if gpus > 1:
                command += ['-m', 'torch.distributed.run', '--standalone']
                command += [f'--nproc_per_node={gpus}']
                options = ['--launcher', 'pytorch', *options]
            command += [osp.join(TOOLS, tool), config, *arguments, *options]
            folder = 'test' if tool == 'test.py' else ''
            command.append(osp.join(self.folder, folder))
            _call(command, env, self.log, stop, lock)

        if not osp.isfile(trained):
            resume = osp.isfile(last) and osp.isfile(_text(last))
            call('train.py', *(['--resume'] if resume else []))
            open(trained, 'w').close()
        call('test.py', _text(last))
        return {**self._metrics(), **self._cost()}

    def _metrics(self) -> dict:
        pattern = osp.join(glob.escape(self.folder), 'test', '*', '*.json')
        files = glob.glob(pattern)
        metrics = {}
        if files:
            with open(max(files, key=osp.getmtime)) as f:
                metrics = json.load(f)
        metrics = {
            name.rpartition('/')[2]: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float))
            and name not in ('time', 'data_time')
        }
        if not metrics:  # MMDetection has none without a prediction
            raise RuntimeError('the training diverged: nothing is predicted')
        return metrics

    def _cost(self) -> dict:
        """Return seconds of an iteration, and memory on a GPU."""
        times, memory = [], []
        pattern = ('*', 'vis_data', 'scalars.json')
        folder = glob.escape(self.folder)
        for path in glob.glob(osp.join(folder, *pattern)):
            with open(path) as f:
                points = [json.loads(line) for line in f]
            points = [p for p in points if 'lr' in p]  # of the training
            times += [p['time'] for p in points if 'time' in p]
            memory += [p['memory'] for p in points if 'memory' in p]
        cost = {}
        if times:
            cost['seconds_per_iter'] = statistics.median(times)
        if memory:
            cost['gigabytes'] = max(memory) / 1024
        return cost


def _text(path: str) -> str:
    with open(path) as f:
        return f.read().strip()


def _tail(path: str, size: int = 20000) -> str:
    """Return the end of a text file that may not be there yet."""
    try:
        with open(path, 'rb') as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(f.tell() - size, 0))
            return f.read().decode(errors='replace')
    except OSError:
        return ''


def _call(command: List[str], env: dict, log: str, stop, lock: int) -> None:
    """Run a command to its end, with its output in a log file.

    Raises:
        Stopped: If ``stop`` was set meanwhile.
        RuntimeError: If it failed, with its last error.
    """
    with open(log, 'ab') as output:
        output.write(f'$ {" ".join(command)}\n'.encode())
        output.flush()
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the parent to pass on
            pass_fds=[lock],
        )
        while process.poll() is None:
            if stop.wait(0.5):
                _end(process)
                raise Stopped
    if process.returncode:
        raise RuntimeError(_last_error(log, process.returncode))


def _end(process: subprocess.Popen) -> None:
    """End a process with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _last_error(log: str, code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = ': out of memory?' if name == 'SIGKILL' else ''
        return f'ended by {name}{hint}'
    lines = _tail(log).rpartition('\n$ ')[2].splitlines()
    for line in reversed(lines):
        found = ERROR.match(line)
        # What torchrun says of a process that failed comes after its error.
        if found and 'torch.distributed.elastic' not in line:
            return found[1][:300]
    return f'ended with exit status {code}'


def run_trainings(
    comparison: Comparison,
    store: CellStore,
    *,
    slots: List[Optional[str]],
    lock: int,
    retry: bool = False,
    console: Optional[Console] = None,
    done: Optional[Callable[[], None]] = None,
) -> None:
    """Run those cells of a comparison that have no record yet.

    Args:
        comparison (Comparison): Its cells.
        store (CellStore): Where their folders are.
        slots (list[str | None]): See :func:`gpu_slots`; one for each training
            that runs at once.
        lock (int): A file that every process keeps open.
        retry (bool): Whether to run failed cells again. Default: False
        console (Console | None): Where progress is shown.
        done (Callable | None): Called after each cell.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM, once all processes have
            ended. Calling again goes on.
    """
    console = console or Console()
    cells = comparison.final_cells()
    todo = []
    for cell in cells:
        record = store.read(cell)
        if record is not None and 'error' in record and retry:
            os.remove(store.path(cell))
            record = None
        if record is None:
            todo.append(Training(cell, comparison, store))
    console.print(
        f'{len(cells) - len(todo)} of {len(cells)} trainings are there, '
        f'{len(todo)} to run, {min(len(slots), len(todo))} at once'
    )
    if not todo:
        return
    free = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    stop = threading.Event()
    threads = max((os.cpu_count() or 1) // len(slots), 1)

    def work(training: Training) -> dict:
        slot = free.get()
        try:
            return training.run(slot, threads, stop, lock)
        finally:
            free.put(slot)

    progress = Progress(
        TextColumn('trainings'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('{task.fields[left]}'),
        console=console,
    )
    pool = ThreadPoolExecutor(len(slots))
    with progress, _terminable():
        bar = progress.add_task('', total=len(todo), left='')
        futures = {pool.submit(work, training): training for training in todo}
        seconds, waiting = [], dict.fromkeys(todo)
        try:
            while futures:
                finished = [f for f in futures if f.done()]
                for future in finished:
                    record = future.result()
                    del waiting[futures.pop(future)]
                    seconds.append(record['seconds'])
                    progress.console.print(
                        f'{cell_name(record["settings"])}: {_said(record)} '
                        f'({record["seconds"]:.0f} s)',
                        highlight=False,
                        markup=False,
                        soft_wrap=True,
                    )
                    progress.advance(bar)
                    if done is not None:
                        done()
                left = _seconds_left(list(waiting), seconds, len(slots))
                if left is not None:
                    left = timedelta(seconds=round(left))
                    progress.update(bar, left=f'about {left} left')
                time.sleep(0.5)
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _said(record: dict) -> str:
    if 'error' in record:
        return record['error']
    (points,) = in_points([record])
    shown = {name: points['result'][name] for name in metrics_of([record], [])}
    return ', '.join(
        f'{metric_name(name)} ' + ('NaN' if value is None else f'{value:.4g}')
        for name, value in shown.items()
    )


def _seconds_left(
    waiting: List[Training], finished: List[float], workers: int
) -> Optional[float]:
    """Estimate how long the rest takes; None: nothing says it yet."""
    now = time.time()
    running = [t for t in waiting if t.started is not None]
    left = {t: t.seconds_left() for t in running}
    known = [t for t in running if left[t] is not None]
    whole = finished + [now - t.started + left[t] for t in known]
    if not whole:
        return None
    mean = statistics.mean(whole)
    rest = mean * (len(waiting) - len(running))
    for t in running:
        guess = max(mean - (now - t.started), 0)
        rest += guess if left[t] is None else left[t]
    return rest / min(workers, max(len(waiting), 1))


class _terminable:
    """Let SIGTERM end the main thread as Ctrl-C does."""

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(
                signal.SIGTERM, signal.default_int_handler
            )

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGTERM, self.before)
