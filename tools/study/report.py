"""Turn the results of a grid into a JSON file, tables and plots.

    python tools/study/report.py tools/study/grids/classification.py

The records of run.py are added to resources/study/<grid>.json, from which
all the rest is made. A grid that is not complete is reported as far as it
goes, and says so.

The grid file's report is a dict: rows and columns name settings, columns_name
and metric_name what readers call them, metric and also what is shown, digits
how precisely. each_seed shows seeds instead of means, in the plot median their
median and dots each of them; everywhere are rows that columns do not change,
error is 100 - metric, curves what was measured during training, log its axis.
compare lists pairs of settings, of one cell each, whose difference is told
with its interval.
"""

import argparse
import os
import os.path as osp

from study import plots, results
from study.cells import Grid, Store

from wsbcn_mm.engine.command_line import UsageError, run


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('grid', nargs='+', help='grid files')
    parser.add_argument(
        '--work-dir',
        default='work_dirs/study',
        help='what run.py was given (default: %(default)s)',
    )
    parser.add_argument(
        '--out',
        default='resources/study',
        help='where results, tables and plots go (default: %(default)s)',
    )
    return parser.parse_args()


def report(path: str, work_dir: str, out: str) -> str:
    """Report one grid; returns its Markdown."""
    grid = Grid(path)
    file = osp.join(out, grid.name)
    kept = results.load(f'{file}.json')
    found = results.collect(grid, Store(work_dir), kept)
    if not found['runs'] and not found['tuning']:
        raise UsageError(
            f'nothing of {path} was run: no record in {work_dir!r}, '
            f'no {file}.json.'
        )
    os.makedirs(out, exist_ok=True)
    results.save(found, f'{file}.json')
    spec = grid.report
    rows = [spec['rows']] if isinstance(spec['rows'], str) else spec['rows']
    parts = [
        f'# {grid.name}\n',
        results.conditions(found),
        f'{spec["metric_name"]}, {results.summarized(spec)}:\n',
        results.table(found, spec, spec['metric']),
        results.differences(found, spec, spec['metric']),
    ]
    for metric, name in spec.get('also', {}).items():
        parts += [
            f'{name}:\n',
            results.table(found, spec, metric),
            results.differences(found, spec, metric),
        ]
    parts.append(results.tuning(found, spec, grid))
    text = '\n'.join(part for part in parts if part)
    with open(f'{file}.md', 'w') as f:
        f.write(text)
    if found['runs']:
        cells = results.by_cell(found, rows, spec['columns'])
        if spec.get('dots'):
            plots.plot_seeds(found, spec, rows, f'{file}.png')
        elif any(len(row) > 1 for row in cells.values()):  # a line to draw
            plots.plot_scores(found, spec, rows, f'{file}.png')
        if 'curves' in spec:
            plots.plot_curves(found, spec, rows, f'{file}_curves.png')
    return text


def main():
    args = parse_args()
    for path in args.grid:
        print(report(path, args.work_dir, args.out))


if __name__ == '__main__':
    run(main)
