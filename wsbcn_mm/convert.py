"""Make a live network train with one or two images per GPU."""

import copy
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Set, Tuple

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import wrappers
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .consumers import other_consumers, record_consumers
from .engine.components import layer_cfg, norm_class, registered, with_rate
from .example_inputs import run_example
from .feeding import (
    NORMALIZATIONS,
    find_feeding_convolutions,
    traceable_parts,
)
from .functional.kernels import statistics_dtype
from .layers._base import NormBase, largest_divisor
from .layers._conv_base import ConvBase
from .layers.bcn import BCN

try:
    from mmcv.ops import SyncBatchNorm as MMSyncBatchNorm
except ImportError:  # an mmcv without ops
    MMSyncBatchNorm = nn.SyncBatchNorm

# What the name of a class of normalizations ends in, or has in it.
NORMALIZATION_NAME = re.compile(
    r'norm(?!al(?!ization))|(ABN|BN|FRN|GDN|GRN|LRN)(Act)?(\dd)?$',
    re.IGNORECASE,
)

VECTORS = 'its input (N, C) has no positions to normalize over in a sample'

PLAIN_FORWARDS = (
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
    wrappers.Conv2d.forward,  # mmcv's, for old versions of torch
    wrappers.Conv3d.forward,
)

HOOKS = (
    '_forward_hooks',
    '_forward_hooks_with_kwargs',
    '_forward_hooks_always_called',
    '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs',
    '_backward_hooks',
    '_backward_pre_hooks',
)


@dataclass(frozen=True)
class Entry:
    """What became of one layer.

    Attributes:
        name (str): Its name in ``named_modules()`` of the network.
        before (str): The layer.
        after (str): What replaces it; empty if it is left.
        reason (str): Why it was left, or how it is known to be right.
        kind (str): ``'convolution'``, ``'batch norm'``, or ``'other norm'``
            for what does not depend on the batch, or is not known to.
    """

    name: str
    before: str
    after: str
    reason: str
    kind: str


@dataclass
class ConversionReport:
    """What :func:`convert_to_micro_batch` changes, what it leaves, and why.

    ``str(report)`` is a table.

    Attributes:
        changed (list[Entry]): The layers that are replaced.
        left (list[Entry]): Normalizations and convolutions that stay.
        misplaced (list[Entry]): Those of ``left`` that standardize their
            weight although something else than a normalization follows.
    """

    changed: List[Entry] = field(default_factory=list)
    left: List[Entry] = field(default_factory=list)
    misplaced: List[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        if self.changed:
            lines += [f'changed ({len(self.changed)}):']
            lines += _columns(
                (e.name, e.before, '-> ' + e.after, e.reason)
                for e in self.changed
            )
        else:
            lines += ['changed: nothing']
        if self.left:
            lines += [f'left as they are ({len(self.left)}):']
            lines += _columns((e.name, e.before, e.reason) for e in self.left)
        return '\n'.join(lines)


def _columns(rows) -> List[str]:
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        '  ' + '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows
    ]


def convert_to_micro_batch(
    module: nn.Module,
    norm_cfg: Optional[dict] = None,
    conv_cfg: Optional[dict] = None,
    images_per_gpu: int = 1,
    images_per_update: int = 16,
    dry_run: bool = False,
    example_inputs: Any = None,
    return_report: bool = False,
):
    r"""Make a network train with one or two images per GPU.

    Every Batch Normalization is replaced by ``norm_cfg``, and every
    convolution whose output goes into such normalizations, and nowhere else,
    by ``conv_cfg``. A normalization that is of the class of ``norm_cfg``
    already stays, but the convolutions before it change as well. Where an
    output goes is found by tracing the forward code with ``torch.fx``; where
    that is not possible, by names (``conv1`` right before ``bn1``). With
    ``example_inputs`` it is seen in a run instead, which works for any
    forward, and follows an output through concatenation, pooling and the
    like, as in a DenseNet. The report says which it was.

    Kept are the parameters of the convolutions (the same objects), the place
    in the network of layers and shared layers, device, dtype, train/eval
    mode, ``requires_grad``, and forward and backward hooks. The parameters of
    the normalizations are new objects: make the optimizer afterwards.

    The function of a trained network is not kept, since every normalization
    becomes another one, but nothing that was learned is thrown away. What
    Batch Normalization had goes to the batch part of a BCN, its estimates
    scaled as the standardized filters are, :math:`\mu_c / s_c` and
    :math:`\sigma^2_c / s_c^2` with :math:`s_c` the standard deviation of
    filter c; the output affine starts at 1 and 0. A scale that was
    initialized with zeros, to make a residual block the identity, becomes the
    output scale: at 0, the batch part's would have huge gradients.

    Args:
        module (nn.Module): A network: of torchvision, timm, an MM library, or
            one's own. It is changed in place.
        norm_cfg (dict | None): The normalization, ``eps`` being that of the
            replaced layer unless given. Default: None,
            ``dict(type='BCN', num_groups=32)`` with the update rate for the
            two numbers below
        conv_cfg (dict | None): The convolution where a normalization follows,
            ``dict(type='Conv2d')`` to leave all as they are.
            Default: None, ``dict(type='ConvWS')``
        images_per_gpu (int): Images in one forward pass of one process.
            Default: 1
        images_per_update (int): Images in one optimizer step, over all
            processes and accumulated passes. Default: 16
        dry_run (bool): Whether to change nothing and return the report.
            Default: False
        example_inputs (Any): What to run the network with, in evaluation mode
            and without gradients: a tuple of arguments, a dict of keyword
            arguments, or the only argument. Default: None
        return_report (bool): Whether to return the report as well.
            Default: False

    Returns:
        nn.Module: The network, which is ``module`` itself unless that is a
        Batch Normalization; with ``return_report``, the network and a
        :class:`ConversionReport`; with ``dry_run``, the report alone.

    Raises:
        TypeError: If an argument is of another type than stated.
        ValueError: If a config names no layer, or the network is wrapped or
            scripted, or does not run with ``example_inputs``. Nothing is
            changed then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> report = convert_to_micro_batch(net, dry_run=True)
        >>> report.changed[0].after
        'ConvWS(3, 8, 3x3)'
        >>> net = convert_to_micro_batch(net)
        >>> net(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """
    _check_module(module)
    conversion = _Conversion(
        module,
        _norm_cfg(norm_cfg, images_per_gpu, images_per_update),
        _conv_cfg(conv_cfg),
    )
    conversion.find_sources(example_inputs)
    conversion.plan()
    if dry_run:
        return conversion.report
    converted = conversion.apply()
    return (converted, conversion.report) if return_report else converted


def _check_module(module) -> None:
    name = 'convert_to_micro_batch'
    if not isinstance(module, nn.Module):
        advice = ''
        if isinstance(module, dict):
            advice = '; for a config use wsbcn_mm.micro_batch_model'
        raise TypeError(
            f'{name}: module must be a torch.nn.Module, got '
            f'{type(module).__name__}{advice}'
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f'{name}: a scripted network cannot be changed; convert it before '
            'torch.jit.script'
        )
    if isinstance(module, DistributedDataParallel):
        raise ValueError(
            f'{name}: DistributedDataParallel already counts on the '
            'parameters of its network; convert the network, then wrap it'
        )


def _check_type(argument: str, cfg, example: str) -> dict:
    if not isinstance(cfg, dict):
        raise TypeError(
            f'convert_to_micro_batch: {argument} must be a dict such as '
            f'{example}, got {cfg!r} ({type(cfg).__name__})'
        )
    cfg = layer_cfg(cfg)
    kind = registered(cfg.get('type'))
    if not (kind and issubclass(kind, nn.Module)):
        raise ValueError(
            f'convert_to_micro_batch: {argument} must name a registered '
            f'layer, such as {example}; got type={cfg.get("type")!r}'
        )
    return cfg


def _norm_cfg(cfg, images_per_gpu: int, images_per_update: int) -> dict:
    cfg = dict(type='BCN', num_groups=32) if cfg is None else cfg
    cfg = _check_type('norm_cfg', cfg, "dict(type='BCN', num_groups=32)")
    if norm_class(cfg) is None:
        raise ValueError(
            'convert_to_micro_batch: norm_cfg must name a normalization of '
            f"feature maps, such as 'BCN' or 'GN'; got type={cfg['type']!r}"
        )
    return with_rate(cfg, images_per_gpu, images_per_update)


def _conv_cfg(cfg) -> dict:
    cfg = dict(type='ConvWS') if cfg is None else cfg
    return _check_type('conv_cfg', cfg, "dict(type='ConvWS')")


def _is_batch_norm(layer: nn.Module) -> bool:
    """Whether a layer is a Batch Normalization, of torch or any library.

    A class that is none of torch's, as the frozen ones of torchvision,
    detectron2, DETR and timm, is known by its tensors and by what it computes
    in evaluation: it is tried rather than believed.
    """
    if isinstance(layer, (_BatchNorm, MMSyncBatchNorm)):
        return not isinstance(layer, NormBase)
    names = ('running_mean', 'running_var', 'weight', 'bias')
    tensors = [getattr(layer, name, None) for name in names]
    if not all(isinstance(t, Tensor) and t.dim() == 1 for t in tensors):
        return False
    try:
        trial = copy.deepcopy(layer).to_empty(device='cpu').float().eval()
        first = torch.linspace(0.5, 1.5, len(tensors[0]))
        values = [first + i for i in range(len(tensors))]
        x = torch.linspace(-9, 9, 8 * len(first)).view(2, -1, 2, 2)
        expected = nn.functional.batch_norm(x, *values, eps=_eps(layer))
        if _is_norm_act(layer):
            expected = trial.act(expected)
        with torch.no_grad():
            for name, value in zip(names, values):
                getattr(trial, name).copy_(value)
            return torch.allclose(trial(x), expected, atol=1e-4)
    except Exception:  # another input, or no way to copy it: another layer
        return False


def _why_other_norm(layer: nn.Module) -> str:
    """Say what kind of normalization a layer looks like; '' for none."""
    if isinstance(layer, NORMALIZATIONS) or 'LayerNorm' in _name(layer):
        return 'does not depend on the batch'
    library = type(layer).__module__
    if isinstance(layer, (_ConvNd, nn.Linear)) or library.startswith(
        ('torch.nn.utils', 'torch.nn.modules.loss')
    ):
        return ''
    tensors = dict(layer.named_parameters(recurse=False))
    tensors.update(layer.named_buffers(recurse=False))
    shapes = {t.shape for t in tensors.values()}
    why = ''
    if any(name.startswith('running_') for name in tensors):
        why = 'keeps statistics, but computes no plain batch normalization'
    elif NORMALIZATION_NAME.search(_name(layer)):
        why = 'a normalization of another kind'
    elif tensors.keys() == {'weight', 'bias'} and len(shapes) == 1:
        why = 'an affine of each channel, as a frozen normalization is'
    # What holds other layers is no layer itself: those are looked at.
    if why and any(
        isinstance(m, (_ConvNd, nn.Linear))
        or _is_batch_norm(m)
        or _why_other_norm(m)
        for m in list(layer.modules())[1:]
    ):
        return ''
    return why


def _name(layer: nn.Module) -> str:
    return type(layer).__name__


def _eps(norm: nn.Module) -> float:
    return getattr(norm, 'eps', 1e-5)


def _describe(layer: nn.Module) -> str:
    kind = type(layer).__name__
    if isinstance(layer, _ConvNd):
        size = 'x'.join(map(str, layer.kernel_size))
        groups = f', groups={layer.groups}' if layer.groups > 1 else ''
        channels = f'{layer.in_channels}, {layer.out_channels}'
        return f'{kind}({channels}, {size}{groups})'
    if isinstance(layer, NormBase):
        return f'{kind}({layer.extra_repr()})'
    if isinstance(layer, nn.GroupNorm):
        return f'{kind}({layer.num_groups}, {layer.num_channels})'
    channels = _num_features(layer)
    return f'{kind}({channels})' if channels else kind


def _num_features(norm: nn.Module) -> int:
    if getattr(norm, 'num_features', None):
        return norm.num_features
    weight = getattr(norm, 'weight', None)
    known = isinstance(weight, Tensor) and not is_lazy(weight)
    return weight.numel() if known else 0


class _Conversion:
    """One network's conversion: look, plan, apply."""

    def __init__(self, module: nn.Module, norm_cfg: dict, conv_cfg: dict):
        self.module = module
        self.norm_cfg = norm_cfg
        self.conv_cfg = conv_cfg
        self.report = ConversionReport()
        self.replacements: Dict[nn.Module, nn.Module] = {}
        self.names: Dict[nn.Module, str] = {}
        self.norms: Dict[nn.Module, None] = {}  # an ordered set
        self.other_norms: Dict[nn.Module, str] = {}
        inside = set()  # a normalization may have modules of its own
        for name, layer in module.named_modules():
            if layer in inside:
                continue
            self.names[layer] = name
            if _is_batch_norm(layer):
                self.norms[layer] = None
            elif not isinstance(layer, NormBase):
                why = _why_other_norm(layer)
                if not why:
                    continue
                self.other_norms[layer] = why
            inside.update(layer.modules())
        self.norm_types = (
            *NORMALIZATIONS,
            *{type(m) for m in self.norms},
        )
        # There already: only the convolutions before them are looked for.
        kind = norm_class(norm_cfg)
        self.present = [
            m
            for m in self.names
            if isinstance(m, kind)
            and m not in self.norms
            and (isinstance(m, NormBase) or not _is_layer_norm(m))
        ]
        self.convs = [m for m in self.names if isinstance(m, _ConvNd)]
        # What is known: the convolutions before each normalization, the shape
        # of its input, and how a convolution is known to be followed by
        # normalizations only, or why it is not.
        self.sources: Dict[nn.Module, list] = {
            n: [] for n in (*self.norms, *self.present)
        }
        self.shapes: Dict[nn.Module, torch.Size] = {}
        self.after_linear = set()  # as they are registered
        self.siblings: Dict[nn.Module, list] = {}
        for parent in self.names:
            children = list(parent.children())
            self.siblings.update(dict.fromkeys(children, children))
            for layer, norm in zip(children, children[1:]):
                if isinstance(layer, nn.Linear):
                    self.after_linear.add(norm)
        self.states: Dict[nn.Module, Dict[str, Tensor]] = {}
        self.evidence: Dict[nn.Module, str] = {}
        self.doubts: Dict[nn.Module, str] = {}
        self.normalized: Set[nn.Module] = set()  # their outputs are
        self.others: Dict[nn.Module, str] = {}  # what else takes them

    # Look ------------------------------------------------------------------

    def find_sources(self, example_inputs) -> None:
        if self.module in self.norms:
            return
        seen = set()
        if example_inputs is not None:
            seen = self._run(example_inputs)
            if seen.issuperset(self.sources):
                return
        layers = {name: layer for layer, name in self.names.items()}
        parts = traceable_parts(self.module, self.norm_types)
        for conv, others in other_consumers(parts, self.norm_types).items():
            self.others.setdefault(conv, ', '.join(sorted(others)))
        found = find_feeding_convolutions(self.module, self.norm_types, parts)
        for name, feeding in found.items():
            norm = layers.get(name)
            if norm in seen:
                continue
            conv = layers.get(feeding.convolution)
            if conv is None and not feeding.traced:
                conv = self._namesake(name)
            if conv is None:
                continue
            self.normalized.add(conv)
            if norm in self.sources:
                self.sources[norm].append(conv)
            if feeding.traced and not feeding.exclusive:
                self.doubts[conv] = feeding.reason
            elif conv not in self.doubts:
                how = 'traced' if feeding.traced else 'judged by names'
                self.evidence.setdefault(conv, how)

    def _namesake(self, name: str) -> Optional[nn.Module]:
        """``conv1`` for ``bn1``, where all convolutions are made first."""
        parent_name, _, own_name = name.rpartition('.')
        children = dict(
            self.module.get_submodule(parent_name).named_children()
        )
        abbr = re.match(r'(batch_?norm|bn|norm)(?![a-z])', own_name)
        conv = abbr and children.get('conv' + own_name[abbr.end() :])
        names = list(children.values())
        norm = children[own_name]
        if (
            isinstance(conv, _ConvNd)
            and conv.out_channels == _num_features(norm)
            and names.index(conv) < names.index(norm)
        ):
            return conv
        return None

    def _run(self, example_inputs) -> set:
        modes = {m: m.training for m in self.module.modules()}
        for layer in modes:
            layer.training = False
        try:
            with torch.no_grad():
                with record_consumers(
                    self.module, self.norm_types
                ) as consumers:
                    run_example(
                        'convert_to_micro_batch', self.module, example_inputs
                    )
        finally:
            for layer, training in modes.items():
                layer.training = training
        self.shapes = consumers.shapes
        self.normalized = set(consumers.norms)
        for norm, sources in consumers.sources.items():
            if norm in self.sources:
                self.sources[norm] = list(sources)
        for conv in consumers.norms:
            if consumers.only_normalizations(conv):
                self.evidence[conv] = 'seen in a run'
            else:
                others = ', '.join(sorted(consumers.others[conv]))
                self.doubts[conv] = f'its output goes to {others} as well'
        for conv, others in consumers.others.items():
            self.others[conv] = names = ', '.join(sorted(others))
            self.doubts.setdefault(conv, f'its output goes to {names}')
        return set(consumers.sources)

    # Plan ------------------------------------------------------------------

    def plan(self) -> None:
        """Make the replacements, so that errors come before changes."""
        kept = {n: self._why_keep_norm(n) for n in self.norms}
        converted = [n for n in self.norms if not kept[n]]
        followed = {
            c for n in (*converted, *self.present) for c in self.sources[n]
        }
        unsure = {c for n in self.norms if kept[n] for c in self.sources[n]}
        reasons = {
            c: self._why_keep_conv(c, followed, unsure) for c in self.convs
        }
        self.replacements = {
            c: self._standardized(c) for c in self.convs if not reasons[c]
        }
        for layer in self.names:
            if layer in reasons:
                if reasons[layer]:
                    self._leave(layer, reasons[layer])
                else:
                    self._change(layer, self.evidence[layer])
            elif layer in kept:
                if kept[layer]:
                    self._leave(layer, kept[layer])
                else:
                    new, note = self._normalization(layer)
                    self.replacements[layer] = new
                    sources = [self.names[c] for c in self.sources[layer]]
                    after = f'after {", ".join(sources)}' if sources else ''
                    self._change(layer, '; '.join(filter(None, (after, note))))
            elif isinstance(layer, NormBase):
                reason = 'made for micro-batches already'
                note = self._rescale(layer)
                self._leave(layer, '; '.join(filter(None, (reason, note))))
            elif layer in self.other_norms:
                self._leave(layer, self.other_norms[layer])

    def _entry(self, layer, after: str, reason: str) -> Entry:
        kind = 'batch norm' if layer in self.norms else 'other norm'
        if isinstance(layer, _ConvNd):
            kind = 'convolution'
        return Entry(self.names[layer], _describe(layer), after, reason, kind)

    def _leave(self, layer, reason: str) -> None:
        entry = self._entry(layer, '', reason)
        self.report.left.append(entry)
        if isinstance(layer, ConvBase) and self._why_misplaced(layer):
            self.report.misplaced.append(entry)

    def _change(self, layer, reason: str) -> None:
        new = self.replacements[layer]
        if isinstance(new, nn.Sequential):  # norm, drop, act
            new = new.norm
        self.report.changed.append(self._entry(layer, _describe(new), reason))

    def _why_keep_norm(self, norm) -> str:
        if any(is_lazy(p) for p in (*norm.parameters(), *norm.buffers())):
            return 'not yet initialized: run the network once before'
        known = (
            _BatchNorm.forward,
            nn.SyncBatchNorm.forward,
            MMSyncBatchNorm.forward,
        )
        if 'forward' in vars(norm) or (
            isinstance(norm, _BatchNorm)
            and type(norm).forward not in known
            and not _is_norm_act(norm)
        ):
            return 'has a forward of its own'
        if hasattr(norm, 'parametrizations'):
            return 'its parameters are parametrized'
        if norm in self.shapes:
            return VECTORS if len(self.shapes[norm]) < 3 else ''
        elif self.sources[norm]:
            return ''
        elif norm in self.after_linear:
            return VECTORS
        elif isinstance(norm, nn.BatchNorm1d):
            return (
                'its input may be (N, C), with no positions; example_inputs '
                'would tell'
            )
        return ''

    def _why_keep_conv(self, conv, followed: set, unsure: set) -> str:
        if isinstance(conv, ConvBase):
            return 'standardizes already' + self._why_misplaced(conv)
        if conv not in followed:
            return self.doubts.get(
                conv, 'no batch normalization is seen to follow'
            )
        if conv in self.doubts:
            return self.doubts[conv]
        if conv in unsure:
            return 'feeds a batch normalization that is left'
        if isinstance(conv, _ConvTransposeNd):
            return 'transposed: a filter is no output channel of it'
        if hasattr(conv, 'parametrizations') or 'weight' not in (
            conv._parameters
        ):
            return 'its weight is parametrized'
        if is_lazy(conv.weight):
            return 'not yet initialized: run the network once before'
        if 'forward' in vars(conv) or not _is_plain(conv):
            return 'a convolution of its own kind'
        kind = self._conv_class(conv)
        if kind is None:
            return f'{self.conv_cfg["type"]} is not made for its dimensions'
        if type(conv) is kind:
            return 'conv_cfg says so'
        if conv.weight[0].numel() < getattr(kind, 'min_fan_in', 1):
            return 'nothing would be left of a filter of one weight'
        return ''

    def _why_misplaced(self, conv) -> str:
        """Say what speaks against a weight being standardized."""
        if conv in self.others:
            return f', although its output goes to {self.others[conv]}'
        siblings = self.siblings.get(conv, ())
        alone = not any(isinstance(m, self.norm_types) for m in siblings)
        if conv not in self.normalized and siblings and alone:
            return ', although no normalization is seen to follow'
        return ''

    def _conv_class(self, conv) -> Optional[type]:
        kind = self.conv_cfg['type']
        dim = conv.weight.dim() - 2
        if isinstance(kind, str):
            if kind in ('Conv', 'Conv1d', 'Conv2d', 'Conv3d'):
                return type(conv)
            kind = MODELS.get(kind if dim == 2 else f'{kind}{dim}d')
        torch_kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        return kind if kind and issubclass(kind, torch_kind) else None

    def _standardized(self, conv) -> nn.Module:
        options = {k: v for k, v in self.conv_cfg.items() if k != 'type'}
        new = self._conv_class(conv)(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        for part in ('_parameters', '_buffers', '_modules'):
            setattr(new, part, {**getattr(new, part), **getattr(conv, part)})
        for key, value in vars(conv).items():
            if key not in ('_parameters', '_buffers', '_modules'):
                setattr(new, key, value)
        return new

    def _normalization(self, norm) -> Tuple[nn.Module, str]:
        channels = _num_features(norm)
        cfg = {'eps': _eps(norm), **self.norm_cfg}
        if cfg['type'] == 'GN':
            groups = cfg.get('num_groups', 32)
            cfg['num_groups'] = largest_divisor(channels, groups)
        new = build_norm_layer(cfg, channels)[1]
        state, note = self._state(norm)
        for tensor in state.values():
            if tensor.is_floating_point():
                new.to(tensor.device, tensor.dtype)
                break
        try:
            new.load_state_dict(state, strict=False)
        except RuntimeError:  # a normalization with parameters of its own
            note = 'its parameters start anew'
        _free_zero_scales(new)
        own = list(norm.parameters(recurse=False))
        if own or isinstance(norm, _BatchNorm):  # else a FrozenBatchNorm2d
            new.requires_grad_(any(p.requires_grad for p in own))
        new.train(norm.training)
        if _is_norm_act(norm):
            parts = dict(norm=new, drop=norm.drop, act=norm.act)
            new = nn.Sequential(OrderedDict(parts))
            new.training = norm.training
        for attribute in HOOKS:
            setattr(new, attribute, getattr(norm, attribute))
        return new, note

    def _rescale(self, norm) -> str:
        """Prepare the estimates of a BCN that stays for its new filters.

        Other estimates are not used in training and soon follow it.
        """
        if norm not in self.sources or not isinstance(norm, BCN):
            return ''
        self.states[norm], note = self._state(norm)
        return note

    def _state(self, norm) -> Tuple[Dict[str, Tensor], str]:
        """What a normalization has learned, for standardized filters."""
        state = {k: v for k, v in norm.state_dict().items() if '.' not in k}
        if not state:
            return state, ''
        if 'running_mean' not in state:  # it has always used the batch's own
            mean = torch.zeros_like(state['weight'])
            state.update(running_mean=mean, running_var=mean + 1)
            return state, ''
        mean, var = state['running_mean'], state['running_var']
        fresh = not mean.is_meta and bool((mean == 0).all() & (var == 1).all())
        sources = self.sources[norm]
        if fresh or not any(c in self.replacements for c in sources):
            return state, ''
        if len(sources) > 1 or sources[0].out_channels != mean.numel():
            mean = torch.zeros_like(mean)
            state.update(running_mean=mean, running_var=mean + 1)
            return state, 'its estimates start anew'
        new = self.replacements[sources[0]]
        with torch.no_grad():
            scale = _filter_scale(new.weight) / _filter_scale(
                new.standardized_weight()
            )
            scale = scale.to(mean)
            bias = 0 if new.bias is None else new.bias.to(mean)
            state['running_mean'] = (mean - bias) / scale + bias
            state['running_var'] = var / scale.square()
        return state, ''

    # Apply -----------------------------------------------------------------

    def apply(self) -> nn.Module:
        if not self.replacements:
            warnings.warn(
                'convert_to_micro_batch: nothing to convert, for '
                + (
                    'the batch normalizations there are have to stay: '
                    f'{self.report}'
                    if self.norms
                    else 'there is no batch normalization in the network, and '
                    f'no plain convolution before a {self.norm_cfg["type"]}'
                ),
                stacklevel=3,
            )
        for parent in self.names:
            for name, child in list(parent._modules.items()):
                if child in self.replacements:
                    parent.add_module(name, self.replacements[child])
        for norm, state in self.states.items():
            for name in ('running_mean', 'running_var'):
                getattr(norm, name).copy_(state[name])
        return self.replacements.get(self.module, self.module)


def _filter_scale(weight: Tensor) -> Tensor:
    """The standard deviation of each filter; 1 for one without any."""
    std = weight.flatten(1).to(statistics_dtype(weight.dtype)).std(1)
    return torch.where(std > 0, std, 1)


def _is_layer_norm(norm: nn.Module) -> bool:
    """Whether it is a layer normalization by the name of GroupNorm."""
    return getattr(norm, 'num_groups', None) == 1


def _is_norm_act(norm: nn.Module) -> bool:
    """Whether it is timm's normalization with dropout and activation."""
    return all(
        isinstance(getattr(norm, part, None), nn.Module)
        for part in ('drop', 'act')
    )


def _is_plain(conv: nn.Module) -> bool:
    """Whether it computes what a torch convolution does."""
    return type(conv).forward in PLAIN_FORWARDS and (
        type(conv)._conv_forward
        in (
            nn.Conv1d._conv_forward,
            nn.Conv2d._conv_forward,
            nn.Conv3d._conv_forward,
        )
    )


@torch.no_grad()
def _free_zero_scales(norm: nn.Module) -> None:
    """Move a group's zeros from the batch part's scale to the output's."""
    if not hasattr(norm, 'batch_weight') or norm.batch_weight.is_meta:
        return
    batch_weight = norm.batch_weight.view(norm.num_groups, -1)
    zero = (batch_weight == 0).all(1)
    batch_weight[zero] = 1
    norm.weight.view(norm.num_groups, -1)[zero] = 0
