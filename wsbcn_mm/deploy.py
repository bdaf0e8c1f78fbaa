"""Take our layers out of a trained network: only stock torch ones remain.

At inference a standardized weight is a constant, and so is the affine of a
batch normalization: the first becomes the weight of a plain convolution, and
the second goes into the convolution before it, which gets a bias. What
remains of BCN is a :class:`torch.nn.GroupNorm`; of BN and MABN nothing.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .feeding import find_feeding_convolutions
from .layers import BCN
from .layers.checkpoint_names import forget_names

STOCK_BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)


@dataclass
class FoldReport:
    """What :func:`fold_for_inference` did.

    Attributes:
        folded (dict[str, str]): Normalization -> the convolution that took
            its batch affine.
        kept (dict[str, str]): Normalization whose batch affine stays, as a
            stock ``BatchNorm2d`` -> why.
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
    module: nn.Module, inplace: bool = False, return_report: bool = False
):
    r"""Replace our layers by stock ones that compute the same in evaluation.

    - A convolution with standardized (or centralized) weight becomes a plain
      one.
    - The batch affine of a :class:`BCN`, :math:`a = \gamma^b / \sqrt{\sigma^2
      + \epsilon}`, :math:`b = \beta^b - a \mu`, goes into the convolution
      before it, :math:`W \leftarrow a W`, and leaves a GroupNorm with one
      affine pair per channel. BN and MABN leave nothing.
    - Where no convolution comes before it, or its output is used elsewhere
      too, the affine stays as a :class:`torch.nn.BatchNorm2d`, and the
      report says so.

    Args:
        module (nn.Module): A trained network.
        inplace (bool): Whether to change ``module`` itself rather than a
            copy. Default: False
        return_report (bool): Whether to return the report too. Default: False

    Returns:
        nn.Module | tuple[nn.Module, FoldReport]: The folded network, in
        evaluation mode; do not train it.

    Raises:
        RuntimeError: If a layer of ours cannot be replaced.

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
    if not inplace:
        module = copy.deepcopy(module)
    module.eval()
    report = FoldReport()
    feedings = find_feeding_convolutions(module)
    for name, conv in list(module.named_modules()):
        if hasattr(conv, 'standardized_weight'):
            module = _replace(module, conv, _plain_convolution(conv))
            report.weights.append(name)
    for name, feeding in feedings.items():
        norm = module.get_submodule(name)
        affine = batch_affine(norm)
        if affine is None:
            continue
        reason = feeding.reason
        if feeding.exclusive:
            conv = module.get_submodule(feeding.convolution)
            folded = _absorb(conv, *affine)
            if folded is not None:
                module = _replace(module, conv, folded)
                module = _replace(module, norm, _remainder(norm))
                report.folded[name] = feeding.convolution
                continue
            reason = f'{type(conv).__name__} is no ordinary convolution'
        report.kept[name] = reason
        if not isinstance(norm, STOCK_BATCH_NORMS):
            parts = [as_batch_norm(norm), _remainder(norm)]
            module = _replace(module, norm, nn.Sequential(*parts).eval())
    for part in module.modules():
        forget_names(part)
    left = [n for n, m in module.named_modules() if is_ours(m)]
    if left:
        raise RuntimeError(
            f'fold_for_inference cannot replace {", ".join(left)} '
            f'({type(module.get_submodule(left[0])).__name__})'
        )
    return (module, report) if return_report else module


def is_ours(module: nn.Module) -> bool:
    """Whether a module needs this package to be loaded."""
    return type(module).__module__.split('.')[0] == __name__.split('.')[0]


def batch_affine(norm: nn.Module) -> Optional[Tuple[Tensor, Tensor]]:
    """The fixed affine, per channel, that a normalization begins with.

    None if it has none, as GroupNorm, or if it is not known to be fixed.
    """
    if isinstance(norm, BCN):
        scale = norm.batch_weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.batch_bias - norm.running_mean * scale
    if type(norm) in STOCK_BATCH_NORMS and norm.running_var is not None:
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        return scale, shift if norm.bias is None else shift + norm.bias
    if hasattr(norm, 'inference_affine'):  # MABN, BGN
        return norm.inference_affine()
    return None


def as_batch_norm(norm: nn.Module) -> nn.BatchNorm2d:
    """The batch affine of a normalization, as a stock layer."""
    scale, shift = batch_affine(norm)
    layer = nn.BatchNorm2d(len(scale), norm.eps).to(scale)
    if isinstance(norm, BCN):
        layer.weight.data = norm.batch_weight.data.clone()
        layer.bias.data = norm.batch_bias.data.clone()
        layer.running_mean = norm.running_mean.clone()
        layer.running_var = norm.running_var.clone()
    else:
        layer.weight.data, layer.bias.data = scale.clone(), shift.clone()
        layer.running_var.fill_(1 - norm.eps)
    return layer.eval()


def _remainder(norm: nn.Module) -> nn.Module:
    """What follows the batch affine."""
    if not isinstance(norm, BCN):
        return nn.Identity()
    return as_group_norm(norm)


def as_group_norm(norm: BCN) -> nn.GroupNorm:
    """The channel part of a BCN, as a stock layer."""
    layer = nn.GroupNorm(norm.num_groups, norm.num_features, norm.eps)
    layer.to(norm.weight)
    repeats = norm.num_features // len(norm.weight)
    layer.weight.data = norm.weight.data.repeat_interleave(repeats)
    layer.bias.data = norm.bias.data.repeat_interleave(repeats)
    return layer.eval()


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
    folded.weight = nn.Parameter(weight)
    folded.bias = nn.Parameter(bias)
    size = [(k - 1) * d + 3 for k, d in zip(conv.kernel_size, conv.dilation)]
    shape = (1, conv.in_channels, *size)
    x = torch.arange(math.prod(shape), device=weight.device).sin()
    x = x.view(shape).to(weight.dtype)
    affine = [t.view(-1, *(1 for _ in size)) for t in (scale, shift)]
    wanted = conv(x) * affine[0] + affine[1]
    error = (folded(x) - wanted).abs().max()
    tolerance = 1e-2 if weight.dtype in (torch.half, torch.bfloat16) else 1e-4
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
