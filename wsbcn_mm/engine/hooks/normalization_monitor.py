"""See what normalization does to the channels of a network in training."""

import sys
import weakref
from contextlib import contextmanager
from typing import Dict, NamedTuple, Optional

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ...layers._base import check_count, in_backward

NORMALIZATIONS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
RELUS = (nn.ReLU, nn.ReLU6)
# A channel is off if ReLU lets fewer than this share of its values pass, and
# constant if its normalized standard deviation is below the other.
ALMOST_OFF = 0.01
ALMOST_CONSTANT = 0.05
# A scale of which there is nothing left to divide by.
NO_SCALE = 1e-3
# What torch.compile, FSDP and activation checkpointing put around modules.
WRAPPERS = ('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')


class LayerReport(NamedTuple):
    """What a normalization layer did to its channels.

    Attributes:
        off (float | None): The share of channels that the ReLU that follows
            turns off at (almost) every position of every image; None where
            the output does not go straight into a ReLU module.
        distance (float | None): The mean over channels of the distance to
            the mean 0 and the standard deviation 1 that Batch Normalization
            gives each of them, before the output affine; None where every
            scale of the affine is 0.
        silent (float | None): The share of channels that no longer depend on
            the input: off, or (almost) constant.
    """

    off: Optional[float]
    distance: Optional[float]
    silent: Optional[float]


class _Layer:
    """Sums over what a layer gave out."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.before_relu = False
        self.count = 0
        self.mean = self.squares = self.positive = 0.0

    @torch.no_grad()
    def add(self, output: Tensor) -> None:
        y = output.detach()
        y = y.flatten(2) if y.dim() > 2 else y.unsqueeze(2)
        if y.numel() == 0:
            return
        count = y.shape[0] * y.shape[2]
        var, mean = torch.var_mean(y.float(), (0, 2), correction=0)
        # Merged pairwise: sums of squares would cancel at a large mean.
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = (
            self.squares
            + var * count
            + delta.square() * (self.count * count / total)
        )
        self.positive = self.positive + (y > 0).sum((0, 2))
        self.count = total

    def report(self) -> LayerReport:
        std = (self.squares / self.count).sqrt()
        scale, shift = self._affine(std)
        with_scale = scale > NO_SCALE
        off = self.positive < ALMOST_OFF * self.count
        constant = std < ALMOST_CONSTANT * scale
        distance = torch.hypot((self.mean - shift) / scale, std / scale - 1)[
            with_scale
        ]
        silent = (constant | off) if self.before_relu else constant
        silent = silent[with_scale]
        return LayerReport(
            float(off.float().mean()) if self.before_relu else None,
            float(distance.mean()) if distance.numel() else None,
            float(silent.float().mean()) if silent.numel() else None,
        )

    def _affine(self, like: Tensor):
        """The output affine of each channel."""
        weight = getattr(self.module, 'weight', None)
        bias = getattr(self.module, 'bias', None)
        scale = torch.ones_like(like)
        shift = torch.zeros_like(like)
        if weight is not None and like.numel() % weight.numel() == 0:
            repeats = like.numel() // weight.numel()  # BCN: a pair per group
            scale = weight.detach().float().repeat_interleave(repeats).abs()
            if bias is not None:
                shift = bias.detach().float().repeat_interleave(repeats)
        return scale, shift


class NormalizationMonitor:
    """Measures normalization layers during forward passes of a model.

    Its hooks are on the model only inside :meth:`watching`, so it costs
    nothing otherwise. Compiled code calls no hooks: it runs as it would
    without ``torch.compile`` in that time, which needs torch 2.6 or newer.

    Args:
        model (nn.Module): Its Batch, Group and Instance Normalizations, and
            this package's, are watched.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU())
        >>> monitor = NormalizationMonitor(model)
        >>> with monitor.watching():
        ...     _ = model(torch.randn(2, 3, 8, 8))
        >>> monitor.reports()['1'].off
        0.0
    """

    def __init__(self, model: nn.Module):
        while is_model_wrapper(model):
            model = model.module
        self._modules = [
            ('.'.join(p for p in name.split('.') if p not in WRAPPERS), module)
            for name, module in model.named_modules()
            if isinstance(module, (*NORMALIZATIONS, *RELUS))
        ]
        self._handles = []
        self._eager = None  # while compiled code is kept from running
        self.reset()

    @property
    def num_layers(self) -> int:
        """Number of normalization layers that are watched."""
        return sum(not isinstance(m, RELUS) for _, m in self._modules)

    def reset(self) -> None:
        """Forget what was seen."""
        self._layers: Dict[str, _Layer] = {}

    def start(self) -> None:
        """Watch the forward passes from here on."""
        self._last = (None, lambda: None)
        if 'torch._dynamo' in sys.modules and hasattr(
            torch.compiler, 'set_stance'
        ):
            self._eager = torch.compiler.set_stance('force_eager')
        for name, module in self._modules:
            if isinstance(module, RELUS):
                handle = module.register_forward_pre_hook(self._on_relu)
            else:
                handle = module.register_forward_hook(self._seen_by(name))
            self._handles.append(handle)

    def stop(self) -> None:
        """Watch no more, and leave no hook on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None

    @contextmanager
    def watching(self):
        """Watch the forward passes of a ``with`` block."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def reports(self) -> Dict[str, LayerReport]:
        """What was seen since the last :meth:`reset`, by layer."""
        return {
            name: layer.report()
            for name, layer in self._layers.items()
            if layer.count
        }

    def _seen_by(self, name: str):
        def hook(module, inputs, output):
            if in_backward():  # activation checkpointing, seen already
                return
            layer = self._layers.setdefault(name, _Layer(module))
            layer.add(output)
            self._last = (layer, weakref.ref(output))

        return hook

    def _on_relu(self, module, inputs) -> None:
        layer, output = self._last
        if layer is not None and output() is inputs[0]:
            layer.before_relu = True


@HOOKS.register_module()
class NormalizationMonitorHook(Hook):
    r"""Log, for any training, what normalization does to the channels.

    Group Normalization sees one image, and gives a group, not a channel, a
    mean and a spread. Channels drift towards constants, or below what the
    following ReLU lets pass: elimination singularities. Users meet them as
    "the model's output seemed independent of the input". This hook logs, per
    normalization layer,

    - ``normalization/<layer>/off``: the share of channels that the following
      ReLU turns off at (almost) every position of every image, where a ReLU
      module follows;
    - ``normalization/<layer>/distance``: how far the channels are from the
      statistics that Batch Normalization gives each of them, the mean over
      channels of :math:`\sqrt{\mu_c^2 + (\sigma_c - 1)^2}`, before the output
      affine (the 2-Wasserstein distance of normal distributions);

    to the visualizer's backends, their means over layers as ``norm_off`` and
    ``norm_distance`` to the training log, and warns once when nearly all
    channels of a layer no longer depend on the input.

    Every ``interval`` iterations it watches as many as it takes to see
    ``num_images`` images, and there are no hooks on the model in between.
    With several processes, those of the first one are watched.

    From `Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization <https://arxiv.org/abs/1903.10520>`_.

    Args:
        interval (int): Iterations from one measurement to the next.
            Default: 500
        num_images (int): Images that a measurement is over. Default: 16
        warn_above (float): The share of channels of a layer that may be off
            or constant without a warning. Default: 0.9

    Raises:
        TypeError, ValueError: If an argument is of another type, or out of
            range.

    Example:
        >>> custom_hooks = [dict(type='NormalizationMonitorHook')]
    """

    def __init__(
        self,
        interval: int = 500,
        num_images: int = 16,
        warn_above: float = 0.9,
    ):
        if not 0 <= warn_above <= 1:
            raise ValueError(
                'NormalizationMonitorHook: warn_above must be in [0, 1], got '
                f'{warn_above!r}'
            )
        name = type(self).__name__
        self.interval = check_count(name, 'interval', interval)
        self.num_images = check_count(name, 'num_images', num_images)
        self.warn_above = warn_above
        self._monitor = None
        self._images = None  # seen so far, while watching
        self._warned = set()
        self._warned_of_nothing = False

    def before_train(self, runner) -> None:
        self._monitor = NormalizationMonitor(runner.model)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self._images is None and runner.iter % self.interval == 0:
            self._monitor.reset()
            self._monitor.start()
            self._images = 0

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        if self._images is None:
            return
        self._images += _num_images(data_batch)
        if self._images >= self.num_images:
            self._finish(runner)

    def after_train(self, runner) -> None:
        if self._images is not None:
            self._monitor.stop()
            self._images = None

    def _finish(self, runner) -> None:
        self._monitor.stop()
        self._images = None
        reports = self._monitor.reports()
        if not reports:
            self._tell_nothing(runner)
        scalars = {}
        for key in ('off', 'distance'):
            values = {
                name: getattr(report, key)
                for name, report in reports.items()
                if getattr(report, key) is not None
            }
            for name, value in values.items():
                scalars[f'normalization/{name}/{key}'] = value
            if values:
                runner.message_hub.update_scalar(
                    f'train/norm_{key}', sum(values.values()) / len(values)
                )
        if scalars:
            runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        self._warn(runner, reports)

    def _tell_nothing(self, runner) -> None:
        if not self._warned_of_nothing:
            self._warned_of_nothing = True
            runner.logger.warning(
                'NormalizationMonitorHook saw no normalization run, in '
                f'{self._monitor.num_layers} layers that it watches (Batch, '
                'Group and Instance Normalization, and those of wsbcn_mm). A '
                'compiled model can be watched with torch 2.6 or newer; '
                "otherwise drop the hook, or 'compile' of the config."
            )

    def _warn(self, runner, reports: Dict[str, LayerReport]) -> None:
        silent = {
            name: report.silent
            for name, report in reports.items()
            if name not in self._warned
            and report.silent is not None
            and report.silent > self.warn_above
        }
        if not silent:
            return
        self._warned.update(silent)
        listed = [f'{n} ({share:.0%})' for n, share in silent.items()]
        more = f' and {len(listed) - 5} more' if len(listed) > 5 else ''
        runner.logger.warning(
            f'At iteration {runner.iter + 1}, nearly all channels of '
            f'{", ".join(listed[:5])}{more} are turned off by ReLU, or are '
            'constant over positions and images: what follows hardly depends '
            'on the input. A normalization that sees one image (GN) does '
            "this; norm_cfg=dict(type='BCN') with conv_cfg="
            "dict(type='ConvWS') is made against it. With BCN, look for a "
            'learning rate that is too high, above all for groups of many '
            "channels with one affine (channel_affine='channel' has one a "
            'channel), or an update rate (momentum) that does not fit the '
            'images per optimizer step.'
        )


def _num_images(data_batch) -> int:
    inputs = data_batch
    if isinstance(data_batch, dict):
        inputs = data_batch.get('inputs')
    elif isinstance(data_batch, (list, tuple)) and data_batch:
        inputs = data_batch[0]
    try:
        return len(inputs)
    except TypeError:
        return 1
