"""What every normalization layer here shares."""

import numbers
import re
import sys
from typing import Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional.kernels import statistics_dtype
from .checkpoint_names import CheckpointNames
from .fusion import GuardedParameters


def check_count(layer: str, name: str, value) -> int:
    """Return ``value`` if it is a positive integer, else raise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f'{layer}: {name} must be a positive integer, got '
            f'{value!r} ({type(value).__name__})'
        )
    if value < 1:
        raise ValueError(
            f'{layer}: {name} must be a positive integer, got {value}'
        )
    return int(value)


def check_eps(layer: str, eps) -> float:
    """Return ``eps`` if it is a number >= 0, else raise."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(
            f'{layer}: eps must be a number >= 0, got {eps!r} '
            f'({type(eps).__name__})'
        )
    if not eps >= 0:
        raise ValueError(f'{layer}: eps must be a number >= 0, got {eps}')
    return float(eps)


def check_momentum(
    layer: str, momentum, optional: bool = True
) -> Optional[float]:
    """Return ``momentum`` if it is in [0, 1], or None where allowed."""
    allowed = 'a number in [0, 1]' + (' or None' if optional else '')
    if momentum is None and optional:
        return None
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(
            f'{layer}: momentum must be {allowed}, got '
            f'{momentum!r} ({type(momentum).__name__})'
        )
    if not 0 <= momentum <= 1:
        raise ValueError(
            f'{layer}: momentum must be {allowed}, got {momentum}'
        )
    return float(momentum)


def largest_divisor(num_features: int, num_groups: int) -> int:
    """The largest divisor of ``num_features`` not above ``num_groups``."""
    return next(
        g
        for g in range(min(num_groups, num_features), 0, -1)
        if num_features % g == 0
    )


HALF = (torch.bfloat16, torch.float16)


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread.

    A forward pass inside one is activation checkpointing doing a forward
    again, which must repeat the first one: nothing may be updated.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class NormBase(GuardedParameters, CheckpointNames, nn.BatchNorm2d):
    """Base of the normalization layers.

    A layer is a ``BatchNorm2d`` (of 3 to 5 dimensions), so whatever finds
    the Batch Normalizations of a network and acts on them acts on it:

    - ``eval()``, as ``norm_eval=True`` calls it, and
      ``track_running_stats = False`` stop the running statistics; so does
      ``momentum = 0``.
    - ``requires_grad = False`` freezes its parameters;
      ``reset_running_stats()`` forgets its running statistics.
    - ``SyncBatchNorm.convert_sync_batchnorm`` shares its batches between
      processes, and a frozen Batch Normalization in its place freezes it:
      see :mod:`.replacement`.
    - Code that folds a Batch Normalization into a convolution is refused:
      see :mod:`.fusion`.

    Args:
        num_features (int): Number of channels C.
        eps (float): Added to variances.
        momentum (float | None): See the layer.

    Attributes:
        statistics (tuple[str]): The buffers that are float32 at least.
        is_synchronized (bool): Whether processes share their batches.
        process_group (ProcessGroup | None): Which processes; None for all.
        is_frozen (bool): Whether ``train()`` leaves the layer in evaluation
            mode.
    """

    guarded = ('weight', 'bias', 'running_mean', 'running_var')
    statistics: Tuple[str, ...] = ('running_mean', 'running_var')

    def __init__(self, num_features: int, eps: float, momentum):
        name = type(self).__name__
        super().__init__(
            check_count(name, 'num_features', num_features),
            check_eps(name, eps),
            momentum,
            affine=False,
            track_running_stats=False,
        )
        self.track_running_stats = True
        self.is_synchronized = self.is_frozen = False
        self.process_group = None

    def _register_statistic(self, name: str, *size: int, device, dtype):
        dtype = statistics_dtype(dtype or torch.get_default_dtype())
        buffer = torch.empty(*size, device=device, dtype=dtype)
        self.register_buffer(name, buffer)

    @property
    def affine(self) -> bool:
        """True, to all but a tool that would convert this layer alone.

        In a network such a tool is seen when it puts a layer in this one's
        place; a layer by itself it would replace without a word.
        """
        frame = sys._getframe(1)
        code, caller = frame.f_code, frame.f_back
        if re.search('convert|freeze', code.co_name) and (
            caller is None or caller.f_code is not code
        ):
            raise RuntimeError(
                f'{code.co_name}() would make another layer of a '
                f'{type(self).__name__} that is in no network. Convert the '
                'network that has it, or call synchronize() or freeze() on '
                'the layer.'
            )
        return True

    @affine.setter
    def affine(self, value: bool) -> None:
        """The constructor of BatchNorm2d has its say."""

    @property
    def momentum(self) -> Optional[float]:
        return self.__dict__['_momentum']

    @momentum.setter
    def momentum(self, value: Optional[float]) -> None:
        if '_momentum' in self.__dict__:
            self.check_new_momentum(value)
        self.__dict__['_momentum'] = value

    def check_new_momentum(self, momentum: Optional[float]) -> None:
        """Raise if setting it would do something else than to a BN."""

    @property
    def is_learning(self) -> bool:
        """Whether a forward now moves the running statistics."""
        return (
            self.training
            and self.track_running_stats
            and self.momentum != 0
            and not in_backward()
        )

    def train(self, mode: bool = True):
        return super().train(mode and not self.is_frozen)

    def freeze(self) -> None:
        """Stay in evaluation mode, and train no parameter any more."""
        self.is_frozen = True
        self.eval()
        self.requires_grad_(False)

    def synchronize(self, process_group=None) -> None:
        """Share every batch with other processes from now on.

        Args:
            process_group (ProcessGroup | None): Which. Default: None, all.
        """
        is_default = dist.is_available() and process_group is dist.group.WORLD
        self.is_synchronized = True
        # None says the same of the default group, and can be pickled.
        self.process_group = None if is_default else process_group

    def __setattr__(self, name: str, value) -> None:
        if (
            value is None
            and name in self.statistics
            and self._buffers.get(name) is not None
        ):
            raise RuntimeError(
                f'{type(self).__name__}: {name} is being removed, as '
                'torch.func.replace_all_batch_norm_modules_ does, but this '
                'layer normalizes with it. Use eval(), by which it stays as '
                'it is, or another normalization.'
            )
        super().__setattr__(name, value)

    def _apply(self, fn, *args, **kwargs):
        before = {name: self._buffers[name] for name in self.statistics}
        super()._apply(fn, *args, **kwargs)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype in HALF:
                self._buffers[name] = old.to(new.device)
        self.widen_statistics()
        return self

    def widen_statistics(self) -> None:
        """Keep running statistics in float32 in a model of half precision.

        An update of a bfloat16 number by less than 1/512 of it is lost.
        """
        for name in self.statistics:
            if self._buffers[name].dtype in HALF:
                self._buffers[name] = self._buffers[name].float()

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.widen_statistics()  # assign=True puts in what it found

    def check_input(self, x: Tensor) -> None:
        """Raise unless ``x`` is what this layer normalizes."""
        name = type(self).__name__
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f'{name}({self.num_features}): expected a '
                f'floating-point tensor, got {got}'
            )
        if not 3 <= x.dim() <= 5 or x.shape[1] != self.num_features:
            raise ValueError(
                f'{name}({self.num_features}): expected an input of shape '
                f'(N, {self.num_features}, *) with 3 to 5 dimensions, got '
                f'{tuple(x.shape)}'
            )

    def check_batch(
        self, batch, x: Tensor, channels: int, what: str, advice: str
    ) -> None:
        """Raise where a training batch has one value a statistic.

        Args:
            batch (Batch | SharedBatch): The batch.
            x (Tensor): Its activations.
            channels (int): How many channels have one statistic together.
            what (str): What they are called.
            advice (str): What to do about it.
        """
        if batch.has_single_value(channels):
            raise ValueError(
                f'{type(self).__name__}({self.num_features}, num_groups='
                f'{self.num_groups}): expected more than one value per {what} '
                f'in training, got an input of shape {tuple(x.shape)}. '
                f'{advice}'
            )

    def __repr__(self) -> str:
        notes = [
            word
            for word in ('synchronized', 'frozen')
            if getattr(self, f'is_{word}')
        ]
        return ', '.join([super().__repr__(), *notes])
