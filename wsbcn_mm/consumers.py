"""What takes the output of each convolution when a network runs.

``torch.fx`` cannot follow every forward (:mod:`.feeding` says what it can),
but any forward can be run. While one runs here, a tensor carries the names of
the convolutions it comes from, as long as it went only through operations
that leave scales alone: reshaping, concatenation, pooling, a ReLU.
"""

from collections import defaultdict
from contextlib import contextmanager
from typing import Dict, List, Set, Tuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .feeding import NORMALIZATIONS, is_metadata

# op(s * x) = s * op(x) for s > 0: what normalizes the result takes the scale
# from x as well. Named without underscores at their ends.
HOMOGENEOUS = frozenset(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
    alpha_dropout cat chunk clone concat concatenate contiguous detach dropout
    dropout1d dropout2d dropout3d expand expand_as feature_dropout flatten
    float getitem half index_select interpolate leaky_relu mean movedim
    narrow native_channel_shuffle channel_shuffle pad permute pixel_shuffle
    pixel_unshuffle relu repeat reshape roll select setitem split squeeze
    stack swapaxes to transpose type type_as unbind unflatten unfold
    unsqueeze upsample view view_as
    """.split()
)

# Take from a tensor its shape, dtype or device only.
UNRELATED = frozenset(
    """
    empty_like full_like get new_empty new_full new_ones new_tensor new_zeros
    ones_like rand_like randn_like zeros_like
    """.split()
)

HOMOGENEOUS_LAYERS = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Flatten,
    nn.Upsample,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
)


class Consumers:
    """What took the output of each convolution.

    Attributes:
        norms (dict[Module, set[Module]]): The normalizations, by convolution.
        others (dict[Module, set[str]]): Everything else, by convolution.
        sources (dict[Module, set[Module]]): The convolutions that each
            normalization met was fed by; none if something else fed it.
        shapes (dict[Module, torch.Size]): The input of each normalization.
    """

    def __init__(self):
        self.norms: Dict[nn.Module, Set[nn.Module]] = defaultdict(set)
        self.others: Dict[nn.Module, Set[str]] = defaultdict(set)
        self.sources: Dict[nn.Module, Set[nn.Module]] = {}
        self.shapes: Dict[nn.Module, torch.Size] = {}

    def only_normalizations(self, convolution: nn.Module) -> bool:
        """Whether the output was taken by normalizations and by nothing else.

        A convolution that did not run is not known to be.
        """
        return bool(self.norms.get(convolution)) and not self.others.get(
            convolution
        )


class _Recorder(TorchFunctionMode):
    def __init__(self, consumers: Consumers):
        super().__init__()
        self.consumers = consumers
        self.origins = WeakIdKeyDictionary()  # tensor -> convolutions
        self.inside = 0  # a layer whose own arithmetic is its own affair

    def origins_of(self, *values) -> frozenset:
        return frozenset().union(
            *(
                self.origins.get(leaf, ())
                for leaf in tree_leaves(values)
                if isinstance(leaf, Tensor)
            )
        )

    def taken(self, origins, by: str) -> None:
        for convolution in origins:
            self.consumers.others[convolution].add(by)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.inside:
            return result
        origins = self.origins_of(args, kwargs)
        if not origins:
            return result
        name = getattr(func, '__name__', str(func)).strip('_')
        if name == 'setitem':  # x[:, :n] = y
            results = [args[0]]
        else:
            results = [r for r in tree_leaves(result) if isinstance(r, Tensor)]
        if not results or name in UNRELATED:
            return result
        if name not in HOMOGENEOUS:
            self.taken(origins, name)
            origins = frozenset()
        for tensor in results:
            self.origins[tensor] = origins
        return result


@contextmanager
def record_consumers(
    module: nn.Module, norm_types: Tuple[type, ...] = NORMALIZATIONS
):
    """Record what takes the output of each convolution of a network.

    Args:
        module (nn.Module): The network that is about to run.
        norm_types (tuple[type]): What counts as a normalization.

    Yields:
        Consumers: Filled while the network runs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> with record_consumers(net) as consumers:
        ...     output = net(torch.randn(1, 3, 8, 8))
        >>> consumers.only_normalizations(net[0])
        True
    """
    consumers = Consumers()
    recorder = _Recorder(consumers)
    names = {m: name for name, m in module.named_modules()}

    def before_norm(norm, args, kwargs):
        if not recorder.inside:
            tensors = [
                a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)
            ]
            origins = recorder.origins_of(tensors)
            consumers.sources.setdefault(norm, set()).update(origins)
            if tensors:
                consumers.shapes.setdefault(norm, tensors[0].shape)
            for convolution in origins:
                consumers.norms[convolution].add(norm)
        recorder.inside += 1

    def before_conv(convolution, args, kwargs):
        if not recorder.inside:
            recorder.taken(
                recorder.origins_of(args, kwargs),
                f'the convolution {names[convolution]}',
            )
        recorder.inside += 1

    def after_conv(convolution, args, kwargs, result):
        recorder.inside -= 1
        if isinstance(result, Tensor) and not recorder.inside:
            recorder.origins[result] = frozenset([convolution])

    def after_norm(norm, args, kwargs, result):
        recorder.inside -= 1
        if isinstance(result, Tensor) and not recorder.inside:
            recorder.origins[result] = frozenset()

    handles = []
    for layer in names:
        if isinstance(layer, norm_types):
            before, after = before_norm, after_norm
        elif isinstance(layer, _ConvNd):
            before, after = before_conv, after_conv
        else:
            continue
        handles += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after, with_kwargs=True),
        ]

    def after_network(network, args, kwargs, result):
        recorder.taken(recorder.origins_of(result), "the network's output")

    handles.append(
        module.register_forward_hook(after_network, with_kwargs=True)
    )
    try:
        with recorder:
            yield consumers
    finally:
        for handle in handles:
            handle.remove()


def other_consumers(
    parts: List[tuple], norm_types: Tuple[type, ...] = NORMALIZATIONS
) -> Dict[nn.Module, Set[str]]:
    """Find what takes convolutions' outputs beside normalizations, by tracing.

    Args:
        parts (list[tuple]): What :func:`.feeding.traceable_parts` returned.
            What happens to the output of a part is not seen.
        norm_types (tuple[type]): What counts as a normalization.

    Returns:
        dict[Module, set[str]]: The convolutions of which that is seen.
    """
    result = defaultdict(set)
    for root, graph in parts:
        for node in graph.nodes:
            if node.op != 'call_module':
                continue
            conv = root.get_submodule(node.target)
            if isinstance(conv, _ConvNd):
                result[conv].update(_other_users(node, root, norm_types))
    return {conv: others for conv, others in result.items() if others}


def _other_users(node: fx.Node, root: nn.Module, norm_types) -> Set[str]:
    """Follow an output through what leaves scales alone."""
    found, seen, nodes = set(), set(), [node]
    while nodes:
        for user in nodes.pop().users:
            if user in seen or user.op == 'output' or is_metadata(user):
                continue
            seen.add(user)
            if user.op == 'call_module':
                layer = root.get_submodule(user.target)
                if isinstance(layer, norm_types):
                    continue
                name = user.target
                goes_on = isinstance(layer, HOMOGENEOUS_LAYERS)
            else:
                name = getattr(user.target, '__name__', user.target)
                name = name.strip('_')
                if name in UNRELATED:
                    continue
                goes_on = name in HOMOGENEOUS
            if goes_on:
                nodes.append(user)
            else:
                found.add(name)
    return found
