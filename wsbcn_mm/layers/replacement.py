"""Let tools that put another layer in the place of one of ours have effect.

``convert_sync_batchnorm`` (torch's, MMEngine's, apex', timm's) and timm's
``freeze_batch_norm_2d`` make a new layer with the tensors of a Batch
Normalization and register it in its place. Such a layer would compute
something else than ours. So ours stays, and does what was asked for.
"""

from typing import Optional

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ._base import NormBase


def _keep_ours(
    parent: nn.Module, name: str, new: Optional[nn.Module]
) -> Optional[nn.Module]:
    old = parent._modules.get(name)
    if (
        not isinstance(old, NormBase)
        or new is None
        or isinstance(new, NormBase)
        or old in new.modules()  # wrapped
        or not _share_memory(old, new)
    ):
        return None
    kind = type(new).__name__
    if 'Sync' in kind:
        old.synchronize(
            getattr(new, 'process_group', None) or getattr(new, 'group', None)
        )
    elif 'Frozen' in kind or not any(True for _ in new.parameters()):
        old.freeze()
    else:
        raise RuntimeError(
            f'a {kind} with the parameters of a {type(old).__name__} is being '
            f'put in its place as {name!r}, and would compute something '
            'else. Build the network with the normalization that is meant, '
            'or see wsbcn_mm.convert_to_micro_batch.'
        )
    return old


def _share_memory(old: nn.Module, new: nn.Module) -> bool:
    places = [
        {
            id(t) if t.is_meta else t.untyped_storage().data_ptr()
            for t in (*layer.parameters(), *layer.buffers())
            if t.numel()
        }
        for layer in (old, new)
    ]
    return not places[0].isdisjoint(places[1])


register_module_module_registration_hook(_keep_ours)
