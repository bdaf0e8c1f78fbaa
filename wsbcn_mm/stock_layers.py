"""Stock torch layers that compute what ours do in evaluation."""

from typing import Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import BCN

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
STOCK_BATCH_NORMS = (*BATCH_NORMS, nn.SyncBatchNorm)


class NotReplaceable(RuntimeError):
    """A layer that computes what no stock layer does."""


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


def check_batch_affines(model: nn.Module) -> None:
    """Raise :class:`NotReplaceable` if one is not one per channel."""
    for name, part in model.named_modules():
        try:
            batch_affine(part)
        except ValueError as error:  # a BGN whose runs split channels
            raise NotReplaceable(
                f'no stock layer can replace {name or "it"}: {error}'
            ) from error


def as_batch_norm(norm: nn.Module, dims: int = 2) -> _BatchNorm:
    """The batch affine of a normalization, as a stock layer.

    Args:
        norm (nn.Module): A normalization that has one.
        dims (int): Dimensions of an image: 1 for a ``BatchNorm1d``, and so
            on. The state dict is the same for all. Default: 2
    """
    scale, shift = batch_affine(norm)
    layer = BATCH_NORMS[dims - 1](len(scale), norm.eps).to(scale)
    if isinstance(norm, BCN):
        layer.weight.data = norm.batch_weight.data.clone()
        layer.bias.data = norm.batch_bias.data.clone()
        layer.running_mean = norm.running_mean.clone()
        layer.running_var = norm.running_var.clone()
    else:
        layer.weight.data, layer.bias.data = scale.clone(), shift.clone()
        layer.running_var.fill_(1 - norm.eps)
    return layer.eval()


def as_group_norm(norm: BCN) -> nn.GroupNorm:
    """The channel part of a BCN, as a stock layer."""
    layer = nn.GroupNorm(norm.num_groups, norm.num_features, norm.eps)
    layer.to(norm.weight)
    repeats = norm.num_features // len(norm.weight)
    layer.weight.data = norm.weight.data.repeat_interleave(repeats)
    layer.bias.data = norm.bias.data.repeat_interleave(repeats)
    return layer.eval()
