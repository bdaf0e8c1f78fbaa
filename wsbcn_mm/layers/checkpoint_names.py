"""Find a normalization's keys in a checkpoint under the name it had there.

The MM libraries name a normalization after its type: ``bn1`` in a BN
checkpoint, ``gn1`` in a GN one, ``bcn1`` here. A layer cannot see its own
name, and when its keys are looked up those of a sibling name are out of its
sight, so its parent gets a hook that renames them.
"""

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


class CheckpointNames:
    """Mixin for a normalization whose name in a checkpoint may differ.

    Attributes:
        _abbr_ (str): What the MM libraries call such a layer's attribute.
        checkpoint_abbrs (tuple[str]): What other types are called, whose
            checkpoints this one understands.
    """

    _abbr_ = 'norm'
    checkpoint_abbrs = ('bcn', 'bn', 'gn', 'mabn', 'bgn', 'norm')


def _rename(parent, state_dict, prefix, *args) -> None:
    """Rename ``bn1.*`` and the like to what ``parent`` calls it."""
    for name, child in parent._modules.items():
        if not (
            isinstance(child, CheckpointNames)
            and name.startswith(child._abbr_)
        ):
            continue
        new = f'{prefix}{name}.'
        if any(key.startswith(new) for key in state_dict):
            continue
        suffix = name[len(child._abbr_) :]
        for abbr in child.checkpoint_abbrs:
            if abbr + suffix in parent._modules:
                continue
            old = f'{prefix}{abbr}{suffix}.'
            for key in [k for k in state_dict if k.startswith(old)]:
                state_dict[new + key[len(old) :]] = state_dict.pop(key)


def _on_registration(parent: nn.Module, name: str, child) -> None:
    # Looked up in __dict__: wrappers forward attributes they do not have yet.
    if (
        isinstance(child, CheckpointNames)
        and '_renames_norms' not in parent.__dict__
    ):
        parent.__dict__['_renames_norms'] = True
        parent.register_load_state_dict_pre_hook(_rename)


def forget_names(parent: nn.Module) -> None:
    """Undo what registering a normalization of ours did to its parent."""
    if parent.__dict__.pop('_renames_norms', False):
        hooks = parent._load_state_dict_pre_hooks
        for key in [k for k, h in hooks.items() if h.hook is _rename]:
            del hooks[key]


register_module_module_registration_hook(_on_registration)
