"""Attack the package as a hostile user and a flaky cluster would.

Runs the tools for real on digit scenes, kills them, fills their disk, hands
them broken files and mistaken configs, and counts what survived.

    python tools/hard_use/run.py                        # some ten minutes
    python tools/hard_use/run.py --only config          # a part of it
    python tools/hard_use/run.py --out docs/hard_use.md
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import List, NamedTuple

# A second thread brings nothing to networks this small.
os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hard_use import ATTACKS, Bench, make_scenes  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import wsbcn_mm  # noqa: E402


class Result(NamedTuple):
    """What became of an attack."""

    group: str
    title: str
    tried: int
    lost: List[tuple]
    notes: List[str]
    seconds: float


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        '--only',
        default='',
        metavar='WORD',
        help='the attacks with this word in their group or title',
    )
    parser.add_argument(
        '--scale',
        type=int,
        default=1,
        metavar='N',
        help='try what is random N times as often (default: 1)',
    )
    parser.add_argument('--out', help='write the table to this Markdown file')
    parser.add_argument(
        '--keep',
        metavar='FOLDER',
        help='work in this folder, and leave there what the runs left',
    )
    return parser.parse_args()


def run_all(args, folder: Path, console: Console) -> List[Result]:
    scenes = make_scenes(folder / 'scenes')
    chosen = [
        attack
        for attack in ATTACKS
        if args.only.lower() in f'{attack.group} {attack.title}'.lower()
    ]
    if not chosen:
        sys.exit(f'error: no attack has {args.only!r} in its title')
    results = []
    for number, attack in enumerate(chosen, 1):
        console.print(
            f'[bold]{number}/{len(chosen)} {attack.group}: {attack.title}',
            highlight=False,
        )
        bench = Bench(
            folder / attack.run.__name__,
            scenes,
            args.scale,
            lambda line: console.print(line, markup=False, highlight=False),
        )
        begin = time.monotonic()
        attack.run(bench)
        results.append(
            Result(
                attack.group,
                attack.title,
                len(bench.tried),
                bench.lost,
                bench.notes,
                time.monotonic() - begin,
            )
        )
    return results


def show(results: List[Result], console: Console) -> None:
    table = Table(title='Hard use')
    for column in ('attack', 'tried', 'survived', 'lost', 'seconds'):
        table.add_column(
            column, justify='left' if column == 'attack' else 'right'
        )
    group = None
    for result in results:
        if result.group != group:
            group = result.group
            table.add_section()
            table.add_row(f'[bold]{group}')
        lost = len(result.lost)
        table.add_row(
            f'  {result.title}',
            str(result.tried),
            str(result.tried - lost),
            f'[red]{lost}' if lost else '0',
            f'{result.seconds:.0f}',
        )
    console.print(table)
    for result in results:
        for what, why in result.lost:
            console.print(f'[red]lost[/] {result.title}: {what}')
            console.print(why, markup=False, highlight=False)


PAGE = """# Hard use

What a hostile user and a flaky cluster do to a run, and what is left of it.
`python tools/hard_use/run.py --out docs/hard_use.md` attacks the tools with
real runs of a small Mask R-CNN and wrote this page; the attacks are in
`tools/hard_use/hard_use`. *Survived* means that nothing saved was lost, that
`--resume` goes on (bit for bit where it says so), and that what cannot work
ends in a few lines that say what, why and what to do, without a traceback.

{date}, {machine}; PyTorch {torch}, wsbcn_mm {version}. {tried} tries,
{survived} survived, {lost} lost, in {minutes:.0f} minutes.

| Attack | Tried | Survived | Lost |
|---|--:|--:|--:|
{rows}

{notes}{losses}
## What guards a run

`tools/train.py` and `tools/test.py` do the following for every config.

- A checkpoint is written beside its place and renamed once it is on the disk;
  the one that it replaces is removed after that. So there must be room for one
  checkpoint more than `max_keep_ckpts`. With other tools, write
  `default_hooks=dict(checkpoint=dict(backend_args=dict(backend='durable')))`.
- `--resume` goes on from the newest checkpoint that is whole, its checksums
  included, and says which it passed over.
- Nothing that is loaded may run code, downloads included. A checkpoint that
  shares no weight with the network is refused; so is, for `test.py` and
  `--resume`, one with half of them or fewer.
- A step by gradients that are not finite is skipped (`SkipNonFiniteHook`). The
  log says so once, with the images, and the number at the end; a hundred in a
  row end the training. With other tools, add the hook to `custom_hooks`.
- A mistake in a config is one message. `WSBCN_MM_TRACEBACK=1` shows the
  traceback, too.
"""


def page(results: List[Result]) -> str:
    rows, group = [], None
    for result in results:
        if result.group != group:
            group = result.group
            rows.append(f'| **{group}** | | | |')
        lost = len(result.lost)
        rows.append(
            f'| {result.title} | {result.tried} | {result.tried - lost} '
            f'| {lost} |'
        )
    notes = [
        f'- {result.title}: {"; ".join(dict.fromkeys(result.notes))}.\n'
        for result in results
        if result.notes
    ]
    losses = [
        f'- **Lost**, {result.title}: {what}: {why.splitlines()[0]}\n'
        for result in results
        for what, why in result.lost
    ]
    tried = sum(result.tried for result in results)
    lost = sum(len(result.lost) for result in results)
    return PAGE.format(
        date=f'{datetime.date.today():%d %B %Y}',
        machine=f'{os.cpu_count()} CPU cores ({platform.machine()}, '
        f'{platform.system()}), Python {platform.python_version()}',
        torch=torch.__version__,
        version=wsbcn_mm.__version__,
        tried=tried,
        survived=tried - lost,
        lost=lost,
        minutes=sum(result.seconds for result in results) / 60,
        rows='\n'.join(rows),
        notes=''.join(notes),
        losses=''.join(losses),
    )


def main():
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        results = run_all(args, folder, console)
    show(results, console)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(page(results))
        console.print(f'Wrote {args.out}')
    sys.exit(any(result.lost for result in results))


if __name__ == '__main__':
    main()
