"""What the benchmarks share: fair timing, the floor, and the reports."""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import sys
import time
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import torch
from rich.progress import track

import wsbcn_mm

STATISTICS = {'median': statistics.median, 'minimum': min}
REPLAYS = 10
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        choices=['cpu', 'cuda'],
    )
    result.add_argument(
        '--repeats', type=int, default=20, help='timings of each variant'
    )
    result.add_argument(
        '--statistic',
        default='median',
        choices=list(STATISTICS),
        help='of the timings; the minimum on a machine that others use',
    )
    result.add_argument(
        '--clock',
        default='wall',
        choices=list(CLOCKS),
        help='cpu, with one thread: does not count waiting for others',
    )
    result.add_argument(
        '--threads', type=int, default=0, help='CPU threads, 0: as it is'
    )
    result.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmarks') / out
    )
    result.add_argument(
        '--small', action='store_true', help='tiny sizes, to see that it runs'
    )
    return result


def begin(args: argparse.Namespace) -> None:
    """Check and apply the options."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit(
            'error: --device cuda, but torch sees no GPU '
            f'(torch {torch.__version__}, CUDA {torch.version.cuda}). '
            'Use --device cpu.'
        )
    if args.repeats < 1:
        raise SystemExit(
            f'error: --repeats must be at least 1, got {args.repeats}'
        )
    if args.clock == 'cpu' and (args.device, args.threads) != ('cpu', 1):
        raise SystemExit(
            'error: --clock cpu counts the time of all threads, and none of '
            'a GPU: it needs --device cpu --threads 1'
        )
    if args.device == 'cpu' and not args.small:
        _keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def _keep_freed_memory() -> None:
    """Let malloc use freed memory again, as jemalloc and CUDA's cache do.

    By itself glibc gives large blocks back. Fresh pages then cost more than
    the arithmetic, for whichever layer happens to ask for them.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def give_back_memory(device: str) -> None:
    """Let what was freed be, so that what comes next finds it as the first.

    Else it would be scattered over whatever the largest one left.
    """
    if device == 'cuda':
        torch.cuda.empty_cache()
    elif hasattr(ctypes.CDLL(None), 'malloc_trim'):
        ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds(
    functions: Dict[str, Callable],
    args: argparse.Namespace,
    on_gpu: bool = False,
) -> Dict[str, float]:
    """How long each takes.

    They take turns, so that a busy or throttled machine is unfair to all, in
    another order each time: who comes after a large one finds its data in the
    caches.

    Args:
        functions (dict): The calls by name.
        args (Namespace): How often and with which clock to measure.
        on_gpu (bool): Whether to measure with events, the GPU's own clock.
    """
    elapsed = _elapsed_on_gpu if on_gpu else _elapsed
    times = {name: [] for name in functions}
    turns = list(functions.items())
    random = Random(0)
    for repeat in range(-2, args.repeats):  # two rounds to warm up
        random.shuffle(turns)
        for name, function in turns:
            time = elapsed(function, args)
            if repeat >= 0:
                times[name].append(time)
    return {name: STATISTICS[args.statistic](t) for name, t in times.items()}


def _elapsed(function: Callable, args: argparse.Namespace) -> float:
    clock = CLOCKS[args.clock]
    synchronize(args.device)
    start = clock()
    function()
    synchronize(args.device)
    return clock() - start


def _elapsed_on_gpu(function: Callable, args: argparse.Namespace) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def without_launching(function: Callable) -> Optional[Callable]:
    """The GPU's part of a call, a number of times (``REPLAYS``) in a row.

    A graph of its launches is made once, so that none of them waits for the
    processor. None where that fails, as of what waits for the GPU.
    """
    # Captured are launches alone: what is done once is done before, on
    # another stream, as torch's notes on graphs have it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        print(f'no graph of its launches: {error}')
        return None

    def replay():
        for _ in range(REPLAYS):
            graph.replay()

    return replay


def copy_bandwidth(args: argparse.Namespace) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(
        2**24 if args.small else 2**30, dtype=torch.uint8, device=args.device
    )
    target = torch.empty_like(source)
    copy = {'copy': lambda: target.copy_(source)}
    times = seconds(copy, args, on_gpu=args.device == 'cuda')
    return 2 * len(source) / times['copy']


def cache_bytes(device: str) -> int:
    """Size of a GPU's L2 cache, 0 elsewhere.

    What is smaller is read from there when a call is repeated, sooner than
    the memory would give it.
    """
    if device != 'cuda':
        return 0
    return getattr(torch.cuda.get_device_properties(0), 'L2_cache_size', 0)


def saved_bytes(function: Callable) -> int:
    """Bytes of the tensors that a forward pass saves, each memory once."""
    memory = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        memory[storage.data_ptr()] = storage.nbytes()
        # Without its graph, which it would hold on to as its output.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(memory.values())


def peak_bytes(function: Callable, device: str) -> int:
    """Peak of the CUDA memory that a call takes, 0 elsewhere."""
    if device != 'cuda':
        return 0
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def launches(function: Callable, device: str) -> List[Tuple[str, float]]:
    """CUDA kernels, copies and fills of a call, and their microseconds."""
    if device != 'cuda':
        return []
    from torch.profiler import DeviceType, ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return [
        (event.name[:40], event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def each(items: List, description: str):
    """Iterate with a progress bar."""
    return track(items, description=description)


@lru_cache(maxsize=None)
def environment(device: str) -> dict:
    """When, on what and with what."""
    machine = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        names = [
            line.split(':')[1].strip()
            for line in lines
            if 'model name' in line
        ]
        machine = names[0] if names else machine
    result = dict(
        date=datetime.now(timezone.utc).isoformat(timespec='minutes'),
        cpu=machine,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 1),
        python=platform.python_version(),
        wsbcn_mm=wsbcn_mm.__version__,
        **{
            name: sys.modules[name].__version__
            for name in ('torch', 'triton', 'mmengine', 'mmcv', 'mmdet')
            if name in sys.modules
        },
    )
    if device == 'cuda':
        result.update(
            gpu=torch.cuda.get_device_name(),
            cuda=torch.version.cuda,
            driver_capability='.'.join(
                map(str, torch.cuda.get_device_capability())
            ),
        )
    return result


def markdown(header: List[str], rows: List[List]) -> str:
    """A table for a README."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(
        '| ' + ' | '.join(_cell(cell) for cell in line) + ' |'
        for line in lines
    )


def _cell(value) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return '-'
        return f'{value:.2f}' if abs(value) < 100 else f'{value:.0f}'
    return str(value)


def keep(
    out: Path, name: str, args: argparse.Namespace, results: list
) -> dict:
    """Write results so far: a limit of time may cut the rest off."""
    out.mkdir(parents=True, exist_ok=True)
    content = dict(
        benchmark=name,
        arguments={k: str(v) for k, v in vars(args).items()},
        environment=environment(args.device),
        results=results,
    )
    path = out / f'{name}.json'
    path.with_suffix('.new').write_text(json.dumps(content, indent=2) + '\n')
    path.with_suffix('.new').replace(path)
    return content


def report(
    out: Path, name: str, args: argparse.Namespace, results: list, table: str
) -> None:
    """Write a JSON file and a table, and print the table."""
    where = keep(out, name, args, results)['environment']
    line = (
        f'{where.get("gpu", where["cpu"])}, {where["threads"]} threads, torch '
        f'{where["torch"]}, {where["date"]}, load {where["load_average"]}, '
        f'{args.statistic} of {args.repeats}, {args.clock} time'
    )
    (out / f'{name}.md').write_text(f'{table}\n\n{line}\n')
    print(f'{table}\n\n{line}\nwritten to {out}')


def bar_plot(
    path: Path, groups: List[str], bars: Dict[str, List[float]], label: str
) -> None:
    """Save a plot with one bar a variant in each group."""
    try:
        import matplotlib
    except ImportError:
        print(f'no {path.name}: there is no matplotlib')
        return
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        figsize=(max(6, 1.6 * len(groups)), 4), layout='constrained'
    )
    width = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        places = [g + (i + 0.5) * width - 0.4 for g in range(len(groups))]
        axes.bar(places, values, width, label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=20, fontsize=8)
    axes.set_ylabel(label)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
