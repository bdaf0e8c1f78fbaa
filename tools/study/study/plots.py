"""The plots of a grid's results."""

import statistics
from typing import List

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

from .results import Score, by_cell, row_name, score  # noqa: E402

COLORS = [f'C{i}' for i in range(10)]
MARKERS = 'osD^vPX*<>'


def plot_scores(results: dict, report: dict, rows: List[str], path: str):
    """A line for each row of the table over its columns.

    Means with their intervals, or, where some trainings collapse and
    ``report['median']`` is set, medians with the least and the greatest.
    Rows named in ``report['everywhere']`` do not depend on the columns, and
    are drawn through all of them.
    """
    cells = by_cell(results, rows, report['columns'])
    columns = sorted({c for row in cells.values() for c in row})
    figure, axes = plt.subplots(figsize=(8, 4.4))
    error = report.get('error', False)
    middles = []
    for i, (row, found) in enumerate(cells.items()):
        points = [
            (column, score(found[column], report['metric']))
            for column in columns
            if column in found
        ]
        points = [(c, s) for c, s in points if s.mean is not None]
        if not points:
            continue
        name, color = row_name(rows, row), COLORS[i % 10]
        x = [c for c, _ in points]
        spans = [_span(s, report.get('median', False)) for _, s in points]
        if error:
            spans = [[100 - v for v in reversed(span)] for span in spans]
        y = [middle for _, middle, _ in spans]
        middles += y
        if name in report.get('everywhere', ()):
            low, middle, high = spans[0]
            axes.axhline(middle, color=color, linestyle='--', label=name)
            axes.axhspan(low, high, color=color, alpha=0.1, lw=0)
            continue
        style = dict(label=name, color=color, marker=MARKERS[i % 10])
        if report.get('each_seed'):  # beside each other, unlike a mean
            dots = [
                (c * 1.02 ** (i - len(cells) / 2), 100 - v if error else v)
                for c, summary in points
                for v in summary.values
            ]
            axes.plot(*zip(*dots), linestyle='', alpha=0.8, **style)
            continue
        bars = [(m - low, high - m) for low, m, high in spans]
        axes.errorbar(x, y, list(zip(*bars)), capsize=3, **style)
    if _powers_of_two(columns):
        axes.set_xscale('log', base=2)
        axes.set_xticks(columns, [f'{c:g}' for c in columns])
    elif min(columns) > 0 and max(columns) > 3 * min(columns):
        axes.set_xscale('log')
    name = report['metric_name']
    axes.set_ylabel(name.replace('accuracy', 'error') if error else name)
    if error or report.get('log'):
        axes.set_yscale('log')
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_minor_formatter('{x:g}')
        # An interval of a collapsed run may reach anywhere.
        axes.set_ylim(0.7 * min(middles), 1.4 * max(middles))
    axes.set_xlabel(report['columns_name'])
    axes.grid(alpha=0.3, which='both')
    # Beside the axes, where it hides nothing.
    axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _span(summary: Score, median: bool) -> List[float]:
    """Where a bar begins, its point, and where it ends."""
    if median:
        values = summary.values
        return [min(values), statistics.median(values), max(values)]
    half = summary.half or 0
    return [summary.mean - half, summary.mean, summary.mean + half]


def plot_seeds(results: dict, report: dict, rows: List[str], path: str):
    """Each seed a dot and their mean a bar, a line for each cell."""
    names = [*rows, report['columns']]
    cells = _flat(results, names)
    metrics = {report['metric']: report['metric_name']}
    metrics.update(report.get('also', {}))
    figure, panels = plt.subplots(
        1,
        len(metrics),
        figsize=(3 + 3.2 * len(metrics), 0.9 + 0.3 * len(cells)),
        sharey=True,
        squeeze=False,
    )
    for axes, (metric, name) in zip(panels[0], metrics.items()):
        for i, runs in enumerate(cells.values()):
            summary, color = score(runs, metric), COLORS[i % 10]
            if summary.mean is None:
                where = axes.get_yaxis_transform()
                axes.text(0.02, i, 'fails', transform=where, va='center')
                continue
            axes.plot(summary.values, [i] * len(summary.values), 'o', c=color)
            axes.plot(summary.mean, i, '|', ms=16, mew=2, color=color)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    labels = [row_name(names, row) for row in cells]
    panels[0][0].set_yticks(range(len(cells)), labels)
    panels[0][0].set_ylim(len(cells) - 0.5, -0.5)
    _save(figure, path)


def plot_curves(results: dict, report: dict, rows: List[str], path: str):
    """What was measured during training: a panel a quantity, means."""
    keys = report['curves']
    figure, panels = plt.subplots(
        1, len(keys), figsize=(4.6 * len(keys), 3.8), squeeze=False
    )
    names = [*rows, report['columns']]
    for axes, (key, label) in zip(panels[0], keys.items()):
        for i, (row, runs) in enumerate(_flat(results, names).items()):
            curves = [r['result']['curves'] for r in runs if 'result' in r]
            if not curves:
                continue
            steps = [point['step'] for point in curves[0]]
            values = [[point[key] for point in c] for c in curves]
            means = [sum(v) / len(v) for v in zip(*values)]
            color = COLORS[i % 10]
            axes.plot(steps, means, color=color, label=row_name(names, row))
            axes.fill_between(
                steps,
                [min(v) for v in zip(*values)],
                [max(v) for v in zip(*values)],
                color=color,
                alpha=0.15,
                lw=0,
            )
        axes.set_xlabel('optimizer step')
        axes.set_ylabel(label)
        if report.get('log'):
            axes.set_yscale('log')
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    _save(figure, path)


def _flat(results: dict, names: List[str]) -> dict:
    runs = {}
    for run in results['runs']:
        key = tuple(run['settings'].get(name) for name in names)
        runs.setdefault(key, []).append(run)
    return runs


def _powers_of_two(columns) -> bool:
    return all(
        c >= 1 and int(c) == c and int(c) & (int(c) - 1) == 0 for c in columns
    )


def _save(figure, path: str) -> None:
    figure.tight_layout()
    # No date inside: the same results make the same file.
    figure.savefig(path, dpi=110, metadata={'Software': None})
    plt.close(figure)
