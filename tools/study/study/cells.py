"""A grid file, the cells it asks for, and their results on disk.

A cell is one training, described by a flat dict of settings. It is one JSON
file, written when the training ends, so that a killed run loses one cell.
"""

import hashlib
import itertools
import json
import os
import os.path as osp
import re
from typing import Dict, List, Optional

from mmengine.config import Config

from wsbcn_mm.engine.command_line import UsageError

# Settings that name a cell's file, before the digest of all of them.
NAMING = ('method', 'images', 'lr', 'seed')


class Grid:
    """The cells of a grid file.

    The file is Python, read by mmengine, with

    - ``task`` (str): A module of ``study.tasks``.
    - ``common`` (dict): Settings of every cell.
    - ``blocks`` (list[dict]): Settings each; a list as a value asks for a
      cell for each of its entries, several lists for each combination. A
      value ``dict(best_of=[...])`` is tuned, as the learning rate is.
    - ``seeds`` (list[int]): Each cell is run with each.
    - ``tune`` (dict, optional): ``lr``, the learning rates to try with
      ``seeds``; each cell takes the best on the validation split. Scores
      that differ by no more than ``tie`` (default: 0) are a tie, which the
      lowest learning rate wins. ``at`` lets several values of a setting
      share what one of them found: ``at=dict(images={1: 2})`` tunes at 2
      for 1.
    - ``report`` (dict): What tables and plots to make: see ``report.py``.

    Args:
        path (str): The grid file.
    """

    def __init__(self, path: str):
        if not osp.isfile(path):
            raise UsageError(f'no grid file {path!r}.')
        config = Config.fromfile(path)
        missing = {'task', 'blocks', 'seeds', 'report'} - set(config.keys())
        if missing:
            raise UsageError(
                f'{path} does not set {", ".join(sorted(missing))}: a grid '
                'file sets task, blocks, seeds and report.'
            )
        self.name = osp.splitext(osp.basename(path))[0]
        self.task = config.task
        self.report = config.report.to_dict()
        self.seeds = list(config.seeds)
        tune = config.get('tune')  # None where a base's is not wanted
        self.tune = tune.to_dict() if tune else None
        common = config.get('common', {})
        rates = {'lr': {'best_of': self.tune['lr']}} if self.tune else {}
        self.cells = [
            {'task': self.task, **common, **rates, **cell}
            for block in config.blocks
            for cell in _combinations(block.to_dict())
        ]
        # The settings that are tuned, of some cells at least.
        self.tuned = sorted(
            {name for cell in self.cells for name in _choices(cell)}
        )
        if self.tuned and not self.tune:
            raise UsageError(
                f'{path} asks for the best {", ".join(self.tuned)} but has '
                "no 'tune' that says with which seeds."
            )

    def tuning_cells(self) -> List[dict]:
        """Return the trainings that choose the settings that are tuned."""
        cells = {}
        for cell in self.cells:
            for candidate in self._candidates(cell):
                for tuned in self._trials(cell, candidate):
                    cells[cell_name(tuned)] = tuned
        return list(cells.values())

    def final_cells(self, results: Dict[str, dict]) -> List[dict]:
        """Return the trainings that are reported.

        Args:
            results (dict): Records of the tuning cells, by name. Cells whose
                tuning is not complete are left out.
        """
        cells = []
        for cell in self.cells:
            best = self.best(cell, results)
            if best is not None:
                cells.append({**cell, **best})
        # Seeds outermost: a run that is stopped leaves whole rows.
        return [
            {**cell, 'seed': seed, 'split': 'test'}
            for seed in self.seeds
            for cell in cells
        ]

    def best(self, cell: dict, results: Dict[str, dict]) -> Optional[dict]:
        """Return the tuned settings with the best validation score.

        Args:
            cell (dict): One of ``cells``.
            results (dict): Records of the tuning cells, by name.

        Returns:
            dict | None: The values chosen for what is tuned; None while a
            record is missing.
        """
        candidates = self._candidates(cell)
        if candidates == [{}]:
            return {}
        scores = []
        for candidate in candidates:
            score = 0.0
            for trial in self._trials(cell, candidate):
                record = results.get(cell_name(trial))
                if record is None:
                    return None
                found = record.get('result', {}).get(self.report['metric'])
                # A training that failed is worse than any that did not.
                score += float('-inf') if found is None else found
            scores.append(score / len(self.tune['seeds']))
        least = max(scores) - self.tune.get('tie', 0)
        tied = [pair for pair in zip(scores, candidates) if pair[0] >= least]
        _, best = min(tied, key=lambda pair: (pair[1].get('lr', 0), -pair[0]))
        return best

    def _candidates(self, cell: dict) -> List[dict]:
        """Return the values that are tried for what is tuned of a cell."""
        return _combinations(_choices(cell))

    def _trials(self, cell: dict, candidate: dict) -> List[dict]:
        """Return the trainings that tell how good a candidate is."""
        if not candidate:
            return []
        stands_for = self.tune.get('at', {})
        tuned = {
            name: stands_for[name].get(value, value)
            if name in stands_for
            else value
            for name, value in cell.items()
        }
        return [
            {**tuned, **candidate, 'seed': seed, 'split': 'val'}
            for seed in self.tune['seeds']
        ]


def _choices(cell: dict) -> dict:
    """Return the settings of a cell that are tuned, with their candidates."""
    return {
        name: value['best_of']
        for name, value in cell.items()
        if isinstance(value, dict)
    }


def _combinations(block: dict) -> List[dict]:
    lists = [
        v if isinstance(v, (list, tuple)) else [v] for v in block.values()
    ]
    return [dict(zip(block, values)) for values in itertools.product(*lists)]


def cell_name(settings: dict) -> str:
    """A name that is readable, and unique to the settings."""
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    parts = [f'{k}={settings[k]}' for k in NAMING if k in settings]
    readable = re.sub(r'[^A-Za-z0-9=.,+-]+', '', ','.join(parts))
    return f'{readable},{digest}'


class Store:
    """The records of cells, one JSON file each.

    A cell is known by its settings, so grids that ask for the same one share
    it.

    Args:
        folder (str): Where they are.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def path(self, settings: dict) -> str:
        return osp.join(self.folder, f'{cell_name(settings)}.json')

    def read(self, settings: dict) -> Optional[dict]:
        path = self.path(settings)
        if not osp.isfile(path):
            return None
        with open(path) as f:
            return json.load(f)

    def write(self, record: dict) -> None:
        os.makedirs(self.folder, exist_ok=True)
        path = self.path(record['settings'])
        partial = f'{path}.{os.getpid()}.partial'
        with open(partial, 'w') as f:
            json.dump(record, f, indent=1)
        os.replace(partial, path)

    def records(self, cells: List[dict]) -> Dict[str, dict]:
        """Those records of ``cells`` that exist, by name."""
        found = {cell_name(c): self.read(c) for c in cells}
        return {name: r for name, r in found.items() if r is not None}
