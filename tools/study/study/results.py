"""From the records of cells to one file, and to tables."""

import json
import math
import os.path as osp
from typing import Dict, List, NamedTuple, Optional, Sequence

from .cells import Grid, Store, cell_name


def collect(grid: Grid, store: Store, kept: Optional[dict] = None) -> dict:
    """All records of a grid as one JSON, environments written once.

    Args:
        grid (Grid): The grid.
        store (Store): Where records are.
        kept (dict | None): What was collected before: it stands for cells
            that have no record in the store. Default: None
    """
    environments, runs = [], {}
    before = kept_records(kept)

    def records(cells: List[dict]) -> Dict[str, dict]:
        found = {**before, **store.records(cells)}
        names = [cell_name(cell) for cell in cells]
        return {name: found[name] for name in names if name in found}

    def lean(record: dict) -> dict:
        if record['environment'] not in environments:
            environments.append(record['environment'])
        kept = {
            k: record[k]
            for k in ('settings', 'result', 'error', 'seconds')
            if k in record
        }
        kept['environment'] = environments.index(record['environment'])
        return kept

    tuning = records(grid.tuning_cells())
    cells = grid.final_cells(tuning)
    runs['tuning'] = [lean(r) for r in tuning.values()]
    runs['runs'] = [lean(r) for r in records(cells).values()]
    return dict(
        grid=grid.name,
        seeds=grid.seeds,
        wanted=len(grid.cells) * len(grid.seeds),
        environments=environments,
        **runs,
    )


def kept_records(kept: Optional[dict]) -> Dict[str, dict]:
    """The records that :func:`collect` made one JSON of, by name."""
    runs = kept['tuning'] + kept['runs'] if kept else []
    return {
        cell_name(run['settings']): {
            **run,
            'environment': kept['environments'][run['environment']],
        }
        for run in runs
    }


HEAD = ('grid', 'seeds', 'wanted')


def save(results: dict, path: str) -> None:
    """Write results, a line for each run, which diffs well."""
    lines = [f'"{k}": {json.dumps(results[k])}' for k in HEAD]
    for key in ('environments', 'tuning', 'runs'):
        entries = ',\n'.join(json.dumps(entry) for entry in results[key])
        lines.append(f'"{key}": [\n{entries}\n]')
    with open(path, 'w') as f:
        f.write('{\n' + ',\n'.join(lines) + '\n}\n')


def load(path: str) -> Optional[dict]:
    """What :func:`save` wrote, if it did."""
    if not osp.isfile(path):
        return None
    with open(path) as f:
        return json.load(f)


class Score(NamedTuple):
    """A mean over seeds with half the width of its 95 % interval.

    Attributes:
        mean (float | None): None where no seed gave a number.
        half (float | None): By Student's t; None for fewer than two numbers.
        values (list[float]): The numbers.
        error (str | None): Why a seed gave none.
    """

    mean: Optional[float]
    half: Optional[float]
    values: List[float]
    error: Optional[str] = None


def score(runs: Sequence[dict], metric: str) -> Score:
    """Summarize the runs of one cell's seeds."""
    errors = [r['error'] for r in runs if 'error' in r]
    error = errors[0] if errors else None
    values = [r['result'].get(metric) for r in runs if 'result' in r]
    values = [v for v in values if v is not None]
    if not values:
        return Score(None, None, [], error)
    if len(values) == 1:
        return Score(values[0], None, values, error)
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1)
    half *= math.sqrt(_variance(values) / len(values))
    return Score(_mean(values), float(half), values, error)


def by_cell(results: dict, rows: List[str], columns: str) -> Dict:
    """Runs by row and column, in the order of the grid file.

    Returns:
        dict: ``{row: {column: [run, ...]}}``, rows being tuples.
    """
    table = {}
    for run in results['runs']:
        settings = run['settings']
        row = tuple(settings.get(name) for name in rows)
        cells = table.setdefault(row, {})
        cells.setdefault(settings.get(columns), []).append(run)
    return table


def row_name(names: List[str], row: tuple) -> str:
    """A row's label: its values, but for what is one's name with theirs."""
    return ', '.join(
        str(v) if n in ('method', 'variant') else f'{n} {v}'
        for n, v in zip(names, row)
        if v is not None
    )


def table(results: dict, report: dict, metric: str) -> str:
    """A table in Markdown."""
    rows = _names(report['rows'])
    cells = by_cell(results, rows, report['columns'])
    columns = sorted({c for row in cells.values() for c in row})
    title = report['columns_name']
    lines = [
        f'| {title} | ' + ' | '.join(f'{c:g}' for c in columns) + ' |',
        '| --- |' + ' ---: |' * len(columns),
    ]
    errors = []
    for row, found in cells.items():
        texts = []
        for column in columns:
            summary = score(found.get(column, []), metric)
            texts.append(_text(summary, len(results['seeds']), report))
            if summary.error and summary.error not in errors:
                errors.append(summary.error)
        if any(texts):
            lines.append(
                f'| {row_name(rows, row)} | ' + ' | '.join(texts) + ' |'
            )
    lines += [''] + [f'Failed runs said: {error}' for error in errors]
    return '\n'.join(lines).rstrip() + '\n'


def _names(rows) -> List[str]:
    return [rows] if isinstance(rows, str) else list(rows)


def summarized(report: dict) -> str:
    """How a table summarizes seeds.

    Where some trainings collapse, ``each_seed`` says more than a mean.
    """
    if report.get('each_seed'):
        return 'each seed'
    return 'mean over seeds ± half of the 95 % interval'


def _text(summary: Score, seeds: int, report: dict) -> str:
    if summary.mean is None:
        return 'fails' if summary.error else ''
    digits = report.get('digits', 2)
    if report.get('each_seed'):
        text = ', '.join(f'{v:.{digits}f}' for v in summary.values)
    else:
        text = f'{summary.mean:.{digits}f}'
        if summary.half is not None:
            text += f' ± {summary.half:.{digits}f}'
    if len(summary.values) < seeds:
        text += f' ({len(summary.values)} of {seeds} runs)'
    return text


def tuning(results: dict, report: dict, grid: Grid) -> str:
    """Return the scores that chose the tuned settings, as Markdown."""
    if grid.tune is None or not results['tuning']:
        return ''
    rows = _names(report['rows'])
    rows += [n for n in grid.tuned if n not in (*rows, 'lr')]
    rates = grid.tune['lr']
    found = {}
    for run in results['tuning']:
        settings = run['settings']
        key = (*(settings.get(n) for n in rows), settings[report['columns']])
        found.setdefault(key, {}).setdefault(settings['lr'], []).append(run)
    lines = [
        f'| score on tuning scenes | {report["columns"]} | '
        + ' | '.join(f'lr {rate:g}' for rate in rates)
        + ' |',
        '| --- | ---: |' + ' ---: |' * len(rates),
    ]
    for key, by_rate in found.items():
        # Means alone: an interval of two seeds says nothing.
        means = [
            score(by_rate.get(rate, []), report['metric'])._replace(half=None)
            for rate in rates
        ]
        texts = [_text(m, len(grid.tune['seeds']), report) for m in means]
        lines.append(
            f'| {row_name(rows, key[:-1])} | {key[-1]:g} | '
            + ' | '.join(texts)
            + ' |'
        )
    lines.append('')
    tie = grid.tune.get('tie', 0)
    if tie:
        lines.append(
            f'Scores within {tie:g} of the best are a tie, which the lowest '
            'learning rate wins.\n'
        )
    return '\n'.join(lines)


class Difference(NamedTuple):
    """The difference of two means with half of its 95 % interval.

    Attributes:
        mean (float): First mean minus second.
        half (float): By Welch's t for unpaired samples.
    """

    mean: float
    half: float


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return how much higher the mean of ``first`` is.

    The samples are not paired: two trainings with the same seed share the
    scenes, but their scores do not correlate enough for pairing to tell more.
    """
    from scipy.stats import t

    parts = [(_variance(v) / len(v), len(v) - 1) for v in (first, second)]
    squared = sum(part for part, _ in parts)
    half = 0.0
    if squared:  # the degrees of freedom of Welch and Satterthwaite
        freedom = squared**2 / sum(part**2 / n for part, n in parts)
        half = float(t.ppf(0.975, freedom)) * math.sqrt(squared)
    return Difference(_mean(first) - _mean(second), half)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)


def differences(results: dict, report: dict, metric: str) -> str:
    """Return the comparisons that ``report['compare']`` asks for.

    It is a list of pairs of settings, each of which names one cell.
    """
    pairs = report.get('compare', [])
    lines = []
    for pair in pairs:
        chosen = [_runs_with(results, settings) for settings in pair]
        first, second = (score(runs, metric).values for runs in chosen)
        if min(len(first), len(second)) < 2:
            continue
        names = [_settings_name(settings) for settings in pair]
        digits = report.get('digits', 2)
        mean, half = difference(first, second)
        if abs(mean) <= half:
            verdict = 'not told apart'
        else:
            verdict = 'higher' if mean > 0 else 'lower'
        lines.append(
            f'| {names[0]} | {names[1]} | {len(first)}, {len(second)} | '
            f'{mean:+.{digits}f} ± {half:.{digits}f} | {verdict} |'
        )
    if not lines:
        return ''
    head = [
        "Differences of means, each with its 95 % interval by Welch's t, not "
        'corrected for their number:',
        '',
        '| | minus | seeds | difference | |',
        '| --- | --- | ---: | ---: | --- |',
    ]
    return '\n'.join(head + lines) + '\n'


def _runs_with(results: dict, settings: dict) -> List[dict]:
    runs = [
        run
        for run in results['runs']
        if all(run['settings'].get(k) == v for k, v in settings.items())
    ]
    seeds = [run['settings']['seed'] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f'{_settings_name(settings)} names more than one cell of the '
            'grid: the comparison needs more settings.'
        )
    return runs


def _settings_name(settings: dict) -> str:
    return row_name(list(settings), tuple(settings.values()))


def conditions(results: dict) -> str:
    """How many runs there are, how long they took, and on what."""
    runs = results['runs'] + results['tuning']
    hours = sum(r['seconds'] for r in runs) / 3600
    machines = {
        (e['accelerator'] or e['processor'], e['threads'])
        for e in results['environments']
    }
    torch = {e['versions'].get('torch') for e in results['environments']}
    done = len(results['runs'])
    text = f'{done} of {results["wanted"]} runs'
    if results['tuning']:
        text += f' and {len(results["tuning"])} to tune the learning rates'
    on = ', '.join(f'{m} ({t} threads each)' for m, t in sorted(machines))
    return f'{text}; {hours:.2f} hours of {on}; torch {", ".join(torch)}.\n'
