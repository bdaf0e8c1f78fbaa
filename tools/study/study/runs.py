"""Run cells in parallel processes, with progress."""

import importlib
import math
import multiprocessing
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import List

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .cells import Store, cell_name
from .environment import environment


def run_cell(settings: dict, folder: str) -> dict:
    """Run one training and write its record, its failure included."""
    task = importlib.import_module(f'study.tasks.{settings["task"]}')
    record = dict(settings=settings)
    start = time.time()
    try:
        record['result'] = _finite(task.run(settings))
    except Exception as error:  # a row of the table, not the grid's end
        record['error'] = f'{type(error).__name__}: {error}'
        record['traceback'] = traceback.format_exc()
    record['seconds'] = round(time.time() - start, 1)
    record['environment'] = environment()
    Store(folder).write(record)
    return record


def _finite(result):
    """The same with None for NaN and infinity, which are no JSON."""
    if isinstance(result, dict):
        return {key: _finite(value) for key, value in result.items()}
    if isinstance(result, list):
        return [_finite(value) for value in result]
    if isinstance(result, float) and not math.isfinite(result):
        return None
    return result


def run_cells(
    cells: List[dict],
    store: Store,
    *,
    workers: int,
    threads: int,
    retry: bool = False,
    title: str = 'cells',
) -> None:
    """Run those of ``cells`` that have no record yet.

    Args:
        cells (list[dict]): Settings.
        store (Store): Where the records are.
        workers (int): Number of processes.
        threads (int): Threads of each.
        retry (bool): Whether to run failed cells again. Default: False
        title (str): What the progress bar says.
    """
    todo = []
    for cell in cells:
        record = store.read(cell)
        if record is None or (retry and 'error' in record):
            todo.append(cell)
    console = Console()
    console.print(
        f'{title}: {len(cells) - len(todo)} there, {len(todo)} to run'
    )
    if not todo:
        return
    for name in {cell['task'] for cell in todo}:
        task = importlib.import_module(f'study.tasks.{name}')
        if hasattr(task, 'prepare'):
            task.prepare([c for c in todo if c['task'] == name])
    progress = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context('spawn'),
        initializer=_start_worker,
        initargs=(threads,),
    )
    with progress, pool:
        bar = progress.add_task('', total=len(todo))
        futures = [pool.submit(run_cell, c, store.folder) for c in todo]
        try:
            for future in as_completed(futures):
                record = future.result()
                what = record.get('result', record.get('error'))
                progress.console.print(
                    f'{cell_name(record["settings"])}: {_short(what)} '
                    f'({record["seconds"]} s)',
                    highlight=False,
                    soft_wrap=True,
                )
                progress.advance(bar)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _short(what) -> str:
    if isinstance(what, str):
        return what[:100]
    numbers = {k: v for k, v in what.items() if isinstance(v, (int, float))}
    return ', '.join(f'{k} {v:.4g}' for k, v in numbers.items())
