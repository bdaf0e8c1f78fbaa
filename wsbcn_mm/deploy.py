"""Take our layers out of a trained network: only stock torch ones remain.

At inference a standardized weight is a constant, and so is the affine of a
batch normalization: the first becomes the weight of a plain convolution, and
the second goes into the convolution before it, which gets a bias. What
remains of BCN is a :class:`torch.nn.GroupNorm`; of BN and MABN nothing.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves, tree_map_only

from .example_inputs import run_example
from .feeding import (
    find_feeding_convolutions,
    parameters_used_directly,
    traceable_parts,
)
from .layers import BCN
from .layers.checkpoint_names import forget_names
from .stock_layers import (
    STOCK_BATCH_NORMS,
    NotReplaceable,
    as_batch_norm,
    as_group_norm,
    batch_affine,
    check_batch_affines,
    is_ours,
)


@dataclass
class FoldReport:
    """What :func:`fold_for_inference` did.

    Attributes:
        folded (dict[str, str]): Normalization -> the convolution that took
            its batch affine.
        kept (dict[str, str]): Normalization whose batch affine stays, as a
            stock ``BatchNorm`` -> why.
        weights (list[str]): Convolutions whose standardized weight became a
            plain one.
    """

    folded: Dict[str, str] = field(default_factory=dict)
    kept: Dict[str, str] = field(default_factory=dict)
    weights: List[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f'{len(self.weights)} standardized weights made plain, '
            f'{len(self.folded)} batch affines folded into convolutions'
        ]
        if self.kept:
            lines.append(f'{len(self.kept)} batch affines kept:')
            lines += [f'  {name}: {why}' for name, why in self.kept.items()]
        return '\n'.join(lines)


@torch.no_grad()
def fold_for_inference(
    module: nn.Module,
    inplace: bool = False,
    return_report: bool = False,
    example_inputs: Any = None,
):
    r"""Replace our layers by stock ones that compute the same in evaluation.

    - A convolution with standardized (or centralized) weight becomes a plain
      one.
    - The batch affine of a :class:`BCN`, :math:`a = \gamma^b / \sqrt{\sigma^2
      + \epsilon}`, :math:`b = \beta^b - a \mu`, goes into the convolution
      before it, :math:`W \leftarrow a W`, and leaves a GroupNorm with one
      affine pair per channel. BN and MABN leave nothing.
    - Where no convolution comes before it, or its output is used elsewhere
      too, the affine stays as a stock BatchNorm, and the report says so. It
      is made for the dimensions of that convolution; without any, for those
      that all convolutions of the network have, or else for two.

    Args:
        module (nn.Module): A trained network.
        inplace (bool): Whether to change ``module`` itself rather than a
            copy. Default: False
        return_report (bool): Whether to return the report too. Default: False
        example_inputs (Any): What to run the network with before and after,
            to compare what it returns: a tuple of arguments, a dict of
            keyword arguments, or the only argument. Default: None

    Returns:
        nn.Module | tuple[nn.Module, FoldReport]: The folded network, in
        evaluation mode; do not train it.

    Raises:
        NotReplaceable: If a layer of ours has no counterpart, or the forward
            code takes a weight past its layer; a RuntimeError. Nothing is
            changed then.
        RuntimeError: If the outputs for ``example_inputs`` differ by more
            than rounding. Nothing is changed then.
        ValueError: If the network does not run with ``example_inputs``, or
            returns nothing to compare.

    .. note::
        Where an output goes is found by tracing the forward code with
        ``torch.fx``: as it runs with the defaults of optional arguments, and,
        if the network as a whole cannot be traced, in each part by itself, as
        if nothing else called the layers of that part. Where it runs
        otherwise, the folded network may compute something else, which
        ``example_inputs`` show.

    Example:
        >>> from wsbcn_mm import BCN, ConvWS
        >>> net = nn.Sequential(ConvWS(3, 8, 3, bias=False), BCN(8)).eval()
        >>> folded = fold_for_inference(net)
        >>> [type(layer).__name__ for layer in folded]
        ['Conv2d', 'GroupNorm']
        >>> x = torch.randn(1, 3, 8, 8)
        >>> torch.allclose(folded(x), net(x), atol=1e-5)
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            'fold_for_inference: expected a torch.nn.Module, got '
            f'{type(module).__name__}'
        )
    _check_replaceable(module)
    if example_inputs is not None and inplace:  # tried first, on a copy
        fold_for_inference(module, example_inputs=example_inputs)
        example_inputs = None
    if not inplace:
        module = copy.deepcopy(module)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    report = FoldReport()
    parts = traceable_parts(module)
    try:
        _check_uses_of_weights(module, parts)
    except NotReplaceable:
        for part, training in modes.items():
            part.training = training
        raise
    feedings = find_feeding_convolutions(module, parts=parts)
    if example_inputs is not None:
        wanted = _outputs(module, example_inputs)
    for name, conv in list(module.named_modules()):
        if hasattr(conv, 'standardized_weight'):
            module = _replace(module, conv, _plain_convolution(conv))
            report.weights.append(name)
    for name, feeding in feedings.items():
        norm = module.get_submodule(name)
        affine = batch_affine(norm)
        if affine is None:
            continue
        conv, remainder = None, _remainder(norm)
        if feeding.convolution is not None:
            conv = module.get_submodule(feeding.convolution)
            # GroupNorm's kernels want the precision of their input.
            remainder.to(conv.weight.dtype)
        reason = feeding.reason
        if feeding.exclusive:
            folded = _absorb(conv, *affine)
            if folded is not None:
                module = _replace(module, conv, folded)
                module = _replace(module, norm, remainder)
                report.folded[name] = feeding.convolution
                continue
            reason = f'{type(conv).__name__} is no ordinary convolution'
        report.kept[name] = reason
        if type(norm) not in STOCK_BATCH_NORMS:
            parts = [as_batch_norm(norm, _dims(conv, module)), remainder]
            module = _replace(module, norm, nn.Sequential(*parts).eval())
    for part in module.modules():
        forget_names(part)
    if example_inputs is not None:
        _check_same(_outputs(module, example_inputs), wanted, module)
    return (module, report) if return_report else module


def _check_replaceable(module: nn.Module) -> None:
    """Raise an error while nothing is changed."""
    check_batch_affines(module)
    inside, left = set(), []
    for name, part in module.named_modules():
        batch = batch_affine(part) is not None
        if batch or hasattr(part, 'standardized_weight'):
            inside.update(part.modules())
        elif is_ours(part) and part not in inside:
            left.append(name)
    if left:
        raise NotReplaceable(
            f'no stock layer can replace {", ".join(left)} '
            f'({type(module.get_submodule(left[0])).__name__})'
        )


def _check_uses_of_weights(module: nn.Module, parts: List[tuple]) -> None:
    """Raise where one would be standardized that was not."""
    used = parameters_used_directly(parts)
    for name, part in module.named_modules():
        if hasattr(part, 'standardized_weight') and part.weight in used:
            raise NotReplaceable(
                f'the forward code takes the weight of {name} itself, in '
                'whose place would be the standardized one'
            )


def _outputs(module: nn.Module, example_inputs: Any) -> List[Tensor]:
    # A copy, for layers that write into their input.
    inputs = tree_map_only(Tensor, Tensor.clone, example_inputs)
    outputs = run_example('fold_for_inference', module, inputs)
    found = [
        t
        for t in tree_leaves(outputs)
        if isinstance(t, Tensor) and t.is_floating_point() and t.numel()
    ]
    if not found:
        raise ValueError(
            'fold_for_inference: the network returns no floating-point tensor '
            f'to compare for these example_inputs, but {type(outputs)}'
        )
    return found


def _check_same(
    outputs: List[Tensor], wanted: List[Tensor], module: nn.Module
) -> None:
    if [t.shape for t in outputs] != [t.shape for t in wanted]:
        raise RuntimeError(
            'fold_for_inference: the folded network returns tensors of other '
            'shapes for these example_inputs'
        )
    difference = largest_difference(outputs, wanted)
    # float32: rounding through a hundred layers.
    tolerance = max(1e-4, 64 * _rounding(*wanted, *module.parameters()))
    if not difference <= tolerance:
        raise RuntimeError(
            'fold_for_inference: the outputs of the folded network differ by '
            f'{difference:.1e} of the largest value for these example_inputs, '
            f'and {tolerance:.0e} is what rounding explains. Tracing did not '
            'see all that its forward code does'
        )


def largest_difference(outputs: List[Tensor], wanted: List[Tensor]) -> float:
    """Of tensors, relative to the largest value of each."""
    differences = [
        (new.float() - old.float()).abs().max() / old.abs().max().clamp(1e-6)
        for new, old in zip(outputs, wanted)
    ]
    return torch.tensor(differences).max().item()


def _rounding(*tensors: Tensor) -> float:
    """The rounding error of the coarsest of some tensors."""
    return max(
        2**-10  # TensorFloat-32, which cuDNN takes for float32
        if t.is_cuda and t.dtype is torch.float32
        else torch.finfo(t.dtype).eps
        for t in tensors
        if t.is_floating_point()
    )


def _dims(conv: Optional[_ConvNd], module: nn.Module) -> int:
    """The dimensions of the images that a normalization takes."""
    convs = module.modules() if conv is None else [conv]
    found = {len(m.kernel_size) for m in convs if isinstance(m, _ConvNd)}
    return found.pop() if len(found) == 1 else 2


def _remainder(norm: nn.Module) -> nn.Module:
    """What follows the batch affine."""
    if not isinstance(norm, BCN):
        return nn.Identity()
    return as_group_norm(norm)


def _plain_convolution(conv: nn.Module) -> nn.Module:
    """A stock convolution with the weight that ``conv`` computes."""
    stock = next(
        c
        for c in type(conv).__mro__
        if c.__module__.startswith('torch.nn.modules.conv')
    )
    weight = conv.standardized_weight()
    layer = stock(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    ).to(weight)
    layer.weight.data = weight.detach().clone()
    if conv.bias is not None:
        layer.bias.data = conv.bias.data.clone()
    return layer.eval()


def _absorb(conv: _ConvNd, scale: Tensor, shift: Tensor) -> Optional[_ConvNd]:
    """``conv`` followed by an affine, as one convolution.

    None if the two do not compute the same, as for a subclass that does
    something to its weight: it is tried rather than believed.
    """
    folded = copy.deepcopy(conv)
    if not isinstance(conv.weight, nn.Parameter) or not _is_plain(conv):
        return None
    if isinstance(conv, _ConvTransposeNd):
        grouped = conv.weight.unflatten(0, (conv.groups, -1))
        factor = scale.view(conv.groups, 1, -1, *(1,) * (grouped.dim() - 3))
        weight = (grouped * factor).flatten(0, 1)
    else:
        weight = conv.weight * scale.view(-1, *(1,) * (conv.weight.dim() - 1))
    bias = shift if conv.bias is None else shift + conv.bias * scale
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype))
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype))
    size = [(k - 1) * d + 3 for k, d in zip(conv.kernel_size, conv.dilation)]
    shape = (1, conv.in_channels, *size)
    x = torch.arange(math.prod(shape), device=weight.device).sin()
    x = x.view(shape).to(conv.weight.dtype)
    affine = [t.view(-1, *(1 for _ in size)) for t in (scale, shift)]
    wanted = conv(x) * affine[0] + affine[1]
    error = (folded(x) - wanted).abs().max()
    tolerance = max(1e-4, 4 * _rounding(conv.weight))
    return folded if error <= tolerance * wanted.abs().max() else None


def _is_plain(conv: _ConvNd) -> bool:
    return not (
        conv._forward_hooks
        or conv._forward_pre_hooks
        or nn.utils.parametrize.is_parametrized(conv)
    )


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is, under the names that it has."""
    if root is old:
        return new
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return root
