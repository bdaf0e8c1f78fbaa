"""Run a grid of trainings.

    python tools/study/run.py tools/study/grids/classification.py --workers 2

A run that was stopped goes on where it was when the command is given again,
and what resources/study holds already is not run again. The results become
tables and plots with report.py.
"""

import argparse
import os.path as osp

from study import results
from study.cells import Grid, Store
from study.runs import run_cells

from wsbcn_mm.engine.command_line import run


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('grid', help='the grid file')
    parser.add_argument(
        '--work-dir',
        default='work_dirs/study',
        help="where the cells' records go, which grids share "
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--kept',
        default='resources/study',
        help='where report.py keeps results (default: %(default)s)',
    )
    parser.add_argument(
        '--workers', type=int, default=1, help='parallel trainings'
    )
    parser.add_argument(
        '--threads', type=int, default=1, help='CPU threads of each training'
    )
    parser.add_argument(
        '--retry', action='store_true', help='run failed cells again'
    )
    parser.add_argument(
        '--list', action='store_true', help='say what there is to run, only'
    )
    args = parser.parse_args()
    for name in ('workers', 'threads'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1')
    return args


def main():
    args = parse_args()
    grid = Grid(args.grid)
    store = Store(args.work_dir)
    kept = results.load(osp.join(args.kept, f'{grid.name}.json'))
    for record in results.kept_records(kept).values():
        if store.read(record['settings']) is None:
            store.write(record)
    tuning = grid.tuning_cells()
    if args.list:
        cells = len(grid.cells) * len(grid.seeds)
        done = store.records(grid.final_cells(store.records(tuning)))
        print(
            f'{grid.name}: tuning {len(store.records(tuning))} of '
            f'{len(tuning)} cells done, trainings {len(done)} of {cells}'
        )
        return
    options = dict(
        workers=args.workers, threads=args.threads, retry=args.retry
    )
    if tuning:
        run_cells(tuning, store, title='tuning', **options)
    cells = grid.final_cells(store.records(tuning))
    run_cells(cells, store, title='trainings', **options)


if __name__ == '__main__':
    run(main)
