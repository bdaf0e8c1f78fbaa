"""Say once, at the end of a loading, what became of a checkpoint.

The layers note what they find while ``load_state_dict`` walks through a
model, torch's as well as mmengine's; the module that the walk began at
collects the notes, and prints them.
"""

import logging
from collections import defaultdict
from statistics import median
from typing import List, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor


class FilterMeans:
    r"""Whether filters look as if trained with Weight Standardization.

    The gradient of a standardized weight is orthogonal to constant filters.
    So the mean of a filter stays what the initialization made it or decays,
    and :math:`t^2 = n \, \mathrm{mean}^2 / \mathrm{var}`, with fan-in n,
    averages 1 or less. Filters trained without it take on a mean, in
    particular those that follow a ReLU. Adam takes steps of its own for each
    weight, by which some layers do so with Weight Standardization too: what
    counts is the median of the layers.
    """

    def __init__(self):
        self.averages, self.count = [], 0

    def add(self, weight: Tensor) -> None:
        some = max(1, len(weight) // 64)  # enough to tell, for little time
        flat = weight.detach()[::some].flatten(1).float()
        if flat.shape[1] > 1:
            var, mean = torch.var_mean(flat, 1)
            t = mean.square() * flat.shape[1] / var
            t = t[t.isfinite()]
            if len(t):
                self.averages.append(t.mean().item())
                self.count += len(t)

    @property
    def typical(self) -> float:
        return median(self.averages) if self.averages else 1.0

    @property
    def surely_standardized(self) -> bool:
        # An initialization gives 1, give or take sqrt(2 / count).
        return self.count >= 128 and self.typical < 0.5

    @property
    def surely_plain(self) -> bool:
        return self.count >= 128 and self.typical > 2


class CheckpointReport:
    """What was taken from a checkpoint, and what does not match.

    Attributes:
        authors_function (dict | None): How the weights were standardized, of
            a checkpoint that the authors' code wrote and that records
            nothing.
    """

    def __init__(self):
        self.authors_function = None
        self.taken = defaultdict(list)
        self.mismatches = defaultdict(list)
        self.unrecorded = {True: FilterMeans(), False: FilterMeans()}

    def take(self, what: str, where: str) -> None:
        """Note a layer that was made out of another one's checkpoint."""
        self.taken[what].append(where.rstrip('.'))

    def mismatch(self, consequence: str, where: str) -> None:
        """Note a layer whose checkpoint does not match it."""
        self.mismatches[consequence].append(where.rstrip('.'))

    def add_weight(self, weight: Tensor, standardized: bool) -> None:
        """Note a weight that nobody recorded the training of."""
        self.unrecorded[standardized].add(weight)

    def finish(self, missing: List[str], unexpected: List[str]) -> None:
        """Print it."""
        if self.unrecorded[True].surely_plain:
            self.mismatch(PLAIN_INTO_STANDARDIZED, 'judged by filter means')
        if self.unrecorded[False].surely_standardized:
            self.mismatch(STANDARDIZED_INTO_PLAIN, 'judged by filter means')
        if self.taken:
            lines = ['Taken from the checkpoint:']
            lines += [f'  {w}: {_some(n)}' for w, n in self.taken.items()]
            missing = [k for k in missing if 'num_batches_tracked' not in k]
            if missing:
                lines.append(f'Not in the checkpoint: {_some(missing)}')
            if unexpected:
                lines.append(f'Left in the checkpoint: {_some(unexpected)}')
            print_log('\n'.join(lines), 'current')
        for consequence, where in self.mismatches.items():
            print_log(
                f'{consequence} ({_some(where)})', 'current', logging.WARNING
            )


PLAIN_INTO_STANDARDIZED = (
    'The checkpoint was trained without Weight Standardization, but is loaded '
    'into convolutions that standardize their weights: filters lose their '
    'mean and their scale, so the outputs are not those of the checkpoint, '
    'and statistics of batches do not fit them. Use plain convolutions, or '
    'fine-tune long enough.'
)
STANDARDIZED_INTO_PLAIN = (
    'The checkpoint was trained with Weight Standardization, but is loaded '
    'into plain convolutions: its weights have no scale of their own, so the '
    "outputs are not those of the checkpoint. Set conv_cfg=dict(type='ConvWS')"
    ', or fold the checkpoint with wsbcn_mm.fold_for_inference first.'
)


def another_function(trained: dict, loaded: dict) -> str:
    """Say that a weight was trained as another function of its parameter."""
    texts = []
    for described in (trained, loaded):
        settings = dict(described)
        name = settings.pop('function')
        arguments = ', '.join(f'{k}={v!r}' for k, v in settings.items())
        texts.append(f'{name}({arguments})')
    return (
        f'The checkpoint was trained with {texts[0]} of its weights, but is '
        f'loaded into convolutions with {texts[1]}: filters have another '
        'scale, so the outputs are not those of the checkpoint. Set in '
        'conv_cfg what it was trained with.'
    )


def _some(names: List[str]) -> str:
    shown = ', '.join(names[:3])
    if len(names) > 3:
        shown += ', ...'
    return f'{len(names)}: {shown}' if len(names) > 1 else shown


_current: Optional[CheckpointReport] = None


def begin_report() -> CheckpointReport:
    """Start a report, which :func:`current_report` is until another."""
    global _current
    _current = CheckpointReport()
    return _current


def end_report() -> None:
    """Let the layers' notes go nowhere."""
    global _current
    _current = None


def current_report() -> CheckpointReport:
    """The report of the loading under way, or one that nobody reads."""
    return CheckpointReport() if _current is None else _current
