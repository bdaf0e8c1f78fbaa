"""Which convolution feeds each normalization of a network.

Standardizing the weights of a convolution is right only where a
normalization follows, and folding an affine into one only where nothing else
sees its output. Both questions are answered here, from the forward code
itself: ``torch.fx`` traces the network, or, where that fails (detectors take
lists and make decisions), every part of it that can be traced.
"""

import inspect
import operator
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Set, Tuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

NORMALIZATIONS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Feeding:
    """What is known about the input of a normalization.

    Attributes:
        convolution (str | None): Qualified name of the convolution whose
            output, and nothing else, the normalization takes.
        exclusive (bool): Whether nothing but this normalization takes that
            convolution's output, and nothing else its parameters, so that it
            can absorb an affine.
        traced (bool): Whether the forward code was followed. If not, the
            answer rests on names and order: ``conv2`` right before ``bn2``.
        reason (str): Why there is no convolution, or it is not exclusive.
    """

    convolution: Optional[str] = None
    exclusive: bool = False
    traced: bool = False
    reason: str = ''


def find_feeding_convolutions(
    module: nn.Module,
    norm_types: Tuple[type, ...] = NORMALIZATIONS,
    parts: Optional[List[tuple]] = None,
) -> Dict[str, Feeding]:
    """Find the convolution that feeds each normalization.

    Args:
        module (nn.Module): A network, in the mode whose forward is meant. It
            is not changed.
        norm_types (tuple[type]): What counts as a normalization.
        parts (list[tuple] | None): What :func:`traceable_parts` returned for
            both, if that is at hand. Default: None

    Returns:
        dict[str, Feeding]: One entry for each normalization, by its name in
        ``module.named_modules()``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> find_feeding_convolutions(net)['1'].convolution
        '0'
    """
    names = {m: name for name, m in module.named_modules()}
    norms = [m for m in names if _is_outermost(m, names, module, norm_types)]
    calls = {norm: [] for norm in norms}
    if parts is None:
        parts = traceable_parts(module, norm_types)
    used = parameters_used_directly(parts)
    for part in parts:
        # The outermost trace sees the most: what it saw stands.
        for norm, found in _calls(part, norm_types).items():
            if not calls[norm]:
                calls[norm] = found
    uses = _weight_uses(module)
    result = {}
    for norm in norms:
        if calls[norm]:
            feeding = _judge(norm, calls, names)
        else:
            feeding = _from_structure(module, names[norm], names)
        if feeding.exclusive:
            name, reason = feeding.convolution, ''
            conv = module.get_submodule(name)
            if uses.get(id(conv.weight), 1) > 1:
                reason = f'{name} shares its weight'
            elif not used.isdisjoint(conv.parameters()):
                reason = f'a parameter of {name} is used elsewhere as well'
            feeding = Feeding(name, not reason, feeding.traced, reason)
        result[names[norm]] = feeding
    return result


def traceable_parts(
    module: nn.Module, norm_types: Tuple[type, ...] = NORMALIZATIONS
) -> List[Tuple[nn.Module, fx.Graph]]:
    """The largest parts that can be traced and have a normalization.

    Args:
        module (nn.Module): A network, in the mode whose forward is meant.
        norm_types (tuple[type]): What counts as a normalization.
    """
    return list(_traceable_parts(module, norm_types))


def parameters_used_directly(parts: List[tuple]) -> Set[nn.Parameter]:
    """Those that the forward code takes itself, past their layer's call.

    Args:
        parts (list[tuple]): What :func:`traceable_parts` returned.
    """
    return {
        parameter for part in parts for parameter in _used_parameters(part)
    }


def _is_outermost(norm, names, module, norm_types) -> bool:
    """A normalization may hold another one that is its own affair."""
    if not isinstance(norm, norm_types):
        return False
    path = names[norm].split('.') if names[norm] else []
    return not any(
        isinstance(module.get_submodule('.'.join(path[:i])), norm_types)
        for i in range(len(path))
    )


def _weight_uses(module: nn.Module) -> Dict[int, int]:
    """How many convolutions hold each weight: RTMDet ties some."""
    uses = {}
    for conv in module.modules():
        if isinstance(conv, _ConvNd):
            uses[id(conv.weight)] = uses.get(id(conv.weight), 0) + 1
    return uses


class _Tracer(fx.Tracer):
    def __init__(self, norm_types):
        super().__init__()
        self.norm_types = norm_types

    def is_leaf_module(self, module, qualified_name) -> bool:
        return (
            isinstance(module, (*self.norm_types, _ConvNd))
            or next(module.children(), None) is None
            or super().is_leaf_module(module, qualified_name)
        )

    def to_bool(self, proxy) -> bool:
        node = proxy.node  # with_cp asks whether its input requires a grad
        if node.target is getattr and node.args[1] == 'requires_grad':
            return False
        return super().to_bool(proxy)


def _traceable_parts(
    module: nn.Module, norm_types
) -> Iterator[Tuple[nn.Module, fx.Graph]]:
    """The largest parts whose forward can be traced, outermost first."""
    if not any(isinstance(m, norm_types) for m in module.modules()):
        return
    if isinstance(module, (*norm_types, _ConvNd)):
        return
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(
            type(module).forward
        ).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    seen, attributes = set(), set(vars(module))
    try:
        graph = _Tracer(norm_types).trace(module, defaults)
    except Exception:  # whatever its forward says to a symbolic input
        pass
    else:
        seen = set(_calls((module, graph), norm_types))
        yield module, graph
    finally:  # constants in the forward code, which fx makes attributes
        for name in vars(module).keys() - attributes:
            delattr(module, name)
    wanted = {m for m in module.modules() if isinstance(m, norm_types)}
    for child in module.children():
        if not wanted.intersection(child.modules()) <= seen:
            yield from _traceable_parts(child, norm_types)


def _source(node) -> Optional[fx.Node]:
    """The input of a call, under whatever name it was given."""
    inputs = [*node.args, *node.kwargs.values()]
    return inputs[0] if inputs and isinstance(inputs[0], fx.Node) else None


def is_metadata(node: fx.Node) -> bool:
    """Whether a use looks at a tensor's shape only."""
    if node.op == 'call_function' and node.target is getattr:
        return node.args[1] in ('shape', 'device', 'dtype', 'requires_grad')
    if node.op == 'call_method':
        return node.target in ('size', 'dim')
    return node.op == 'call_function' and node.target is operator.is_


def _used_parameters(part) -> Iterator[nn.Parameter]:
    """Those that the forward code itself takes, past a layer's call."""
    root, graph = part
    parameters = dict(root.named_parameters())
    for node in graph.nodes:
        if node.op == 'get_attr' and node.target in parameters:
            if not all(map(is_metadata, node.users)):
                yield parameters[node.target]


def _calls(part, norm_types) -> Dict[nn.Module, List[tuple]]:
    """For each normalization: (source or None, other users) of its calls."""
    root, graph = part
    modules = {
        node: root.get_submodule(node.target)
        for node in graph.nodes
        if node.op == 'call_module'
    }
    result = {}
    for node, norm in modules.items():
        if isinstance(norm, norm_types):
            source = _source(node)
            conv = modules.get(source)
            conv = conv if isinstance(conv, _ConvNd) else None
            result.setdefault(norm, []).append((conv, True))
    for node, conv in modules.items():
        if isinstance(conv, _ConvNd):
            users = [u for u in node.users if not is_metadata(u)]
            norms = [modules.get(u) for u in users]
            for norm in norms:
                if isinstance(norm, norm_types) and len(users) > 1:
                    result[norm].append((conv, False))
            if not any(isinstance(n, norm_types) for n in norms):
                # This call's output is not normalized: let those norms
                # that follow another call of the same convolution know.
                for calls in result.values():
                    if any(c is conv for c, _ in calls):
                        calls.append((conv, False))
    return result


def _judge(norm: nn.Module, calls, names) -> Feeding:
    sources = {conv for conv, _ in calls[norm]}
    if sources == {None}:
        return Feeding(traced=True, reason='no convolution before it')
    if len(sources) > 1:
        return Feeding(traced=True, reason='it follows several layers')
    (conv,) = sources
    others = [
        names[other]
        for other, found in calls.items()
        if other is not norm and any(c is conv for c, _ in found)
    ]
    reason = ''
    if others:
        reason = f'{names[conv]} feeds {", ".join(others)} as well'
    elif not all(exclusive for _, exclusive in calls[norm]):
        reason = f'the output of {names[conv]} is used elsewhere as well'
    return Feeding(names[conv], not reason, True, reason)


def _from_structure(module: nn.Module, name: str, names) -> Feeding:
    """``conv2`` right before ``bn2``, as the MM libraries build them."""
    if not name:
        return Feeding(reason='it stands alone')
    parent_name, _, own_name = name.rpartition('.')
    parent = module.get_submodule(parent_name)
    children = list(parent.named_children())
    index = [child_name for child_name, _ in children].index(own_name)
    norm = children[index][1]
    channels = getattr(norm, 'num_features', None) or getattr(
        norm, 'num_channels', None
    )
    if index:
        conv_name, conv = children[index - 1]
        if (
            isinstance(conv, _ConvNd)
            and conv.out_channels == channels
            and conv_name.lstrip('abcdefghijklmnopqrstuvwxyz')
            == own_name.lstrip('abcdefghijklmnopqrstuvwxyz')
        ):
            return Feeding(
                names[conv],
                reason='its forward could not be traced: judged by names',
            )
    return Feeding(reason='its forward could not be traced')
