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
      cell for each of its entries, several lists for each combination.
    - ``seeds`` (list[int]): Each cell is run with each.
    - ``tune`` (dict, optional): ``lr``, the learning rates to try with
      ``seeds``; each cell takes the best on the validation split. ``at``
      lets several values of a setting share what one of them found:
      ``at=dict(images={1: 2})`` tunes at 2 for 1.
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
        self.cells = [
            {'task': self.task, **common, **cell}
            for block in config.blocks
            for cell in _combinations(dict(block))
        ]

    def tuning_cells(self) -> List[dict]:
        """The trainings that choose the learning rates."""
        if self.tune is None:
            return []
        cells = {}
        for cell in self.cells:
            for lr in self.tune['lr']:
                for seed in self.tune['seeds']:
                    tuned = {**self._tuned(cell), 'lr': lr, 'seed': seed}
                    tuned['split'] = 'val'
                    cells[cell_name(tuned)] = tuned
        return list(cells.values())

    def final_cells(self, results: Dict[str, dict]) -> List[dict]:
        """The trainings that are reported.

        Args:
            results (dict): Records of the tuning cells, by name. Cells whose
                tuning is not complete are left out.
        """
        cells = []
        for cell in self.cells:
            if self.tune is not None:
                lr = self.best_lr(cell, results)
                if lr is None:
                    continue
                cell = {**cell, 'lr': lr}
            cells.append(cell)
        # Seeds outermost: a run that is stopped leaves whole rows.
        return [
            {**cell, 'seed': seed, 'split': 'test'}
            for seed in self.seeds
            for cell in cells
        ]

    def best_lr(self, cell: dict, results: Dict[str, dict]):
        """The learning rate with the best validation score, if known."""
        scores = {}
        for lr in self.tune['lr']:
            for seed in self.tune['seeds']:
                tuned = {**self._tuned(cell), 'lr': lr, 'seed': seed}
                record = results.get(cell_name({**tuned, 'split': 'val'}))
                if record is None:
                    return None
                score = record.get('result', {}).get(self.report['metric'])
                # A training that failed is worse than any that did not.
                scores.setdefault(lr, []).append(
                    float('-inf') if score is None else score
                )
        return max(scores, key=lambda lr: sum(scores[lr]))

    def _tuned(self, cell: dict) -> dict:
        """The cell that stands for ``cell`` in the tuning."""
        stands_for = self.tune.get('at', {})
        return {
            name: stands_for[name].get(value, value)
            if name in stands_for
            else value
            for name, value in cell.items()
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
