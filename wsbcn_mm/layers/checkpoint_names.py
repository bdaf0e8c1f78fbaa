"""Find a layer's keys in a checkpoint under the name they have there.

The MM libraries name a normalization after its type: ``bn1`` in a BN
checkpoint, ``gn1`` in a GN one, ``bcn1`` here. A layer cannot see its own
name, and when its keys are looked up those of a sibling name are out of its
sight, so its parent gets hooks that rename them. They also record which
convolutions standardize their weight, and how, since a checkpoint's keys do
not show it, and compare that with the model that loads it. The module that a
loading begins at prints what came of it.
"""

import weakref

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_module_registration_hook

from .checkpoint_layouts import authors_weight_function
from .checkpoint_report import (
    PLAIN_INTO_STANDARDIZED,
    STANDARDIZED_INTO_PLAIN,
    another_function,
    begin_report,
    current_report,
    end_report,
)

RECORD = 'standardized_weights'


class CheckpointNames:
    """Mixin for a normalization whose name in a checkpoint may differ.

    Attributes:
        _abbr_ (str): What the MM libraries call such a layer's attribute.
        checkpoint_abbrs (tuple[str]): What other types are called, whose
            checkpoints this one understands.
    """

    _abbr_ = 'norm'
    checkpoint_abbrs = ('bcn', 'bn', 'gn', 'mabn', 'bgn', 'norm')


def _standardizes(module) -> bool:
    return hasattr(type(module), 'standardized_weight')


def describe_weight_function(conv) -> dict:
    """Return the function of a convolution's weight, and its settings."""
    function, _, settings = conv.weight_function()
    return dict(function=function.__name__, **settings)


_root = None  # the module that a loading began at


def _before_loading(parent, state_dict, prefix, local_metadata, *args):
    global _root
    if prefix == '':
        _root = weakref.ref(parent)
        begin_report().authors_function = authors_weight_function(state_dict)
    _rename(parent, state_dict, prefix)
    _compare_weights(parent, state_dict, prefix, local_metadata)


def _after_loading(parent, incompatible_keys) -> None:
    global _root
    if _root is not None and _root() is parent:
        current_report().finish(*incompatible_keys)
        end_report()
        _root = None


def _rename(parent, state_dict, prefix: str) -> None:
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


def _record_weights(parent, state_dict, prefix, local_metadata) -> None:
    """Note in a checkpoint which convolutions standardize their weight."""
    local_metadata[RECORD] = {
        name: describe_weight_function(m)
        for name, m in parent._modules.items()
        if _standardizes(m)
    }


def _compare_weights(parent, state_dict, prefix, local_metadata) -> None:
    if not any(
        isinstance(m, CheckpointNames) or _standardizes(m)
        for m in parent._modules.values()
    ):
        return
    record = local_metadata.get(RECORD)
    report = current_report()
    for name, child in parent._modules.items():
        weight = state_dict.get(f'{prefix}{name}.weight')
        if (
            not isinstance(child, _ConvNd)
            or weight is None
            or weight.shape != child.weight.shape
        ):
            continue
        standardizes = _standardizes(child)
        trained = None
        if record is None:
            trained = report.authors_function
            if trained is None:
                report.add_weight(weight, standardizes)
            elif not standardizes and f'{prefix}{name}.bias' not in state_dict:
                # Only their last layer, with a bias, is not standardized.
                report.mismatch(STANDARDIZED_INTO_PLAIN, prefix + name)
        elif (name in record) and not standardizes:
            report.mismatch(STANDARDIZED_INTO_PLAIN, prefix + name)
        elif standardizes and name not in record:
            report.mismatch(PLAIN_INTO_STANDARDIZED, prefix + name)
        elif isinstance(record, dict):  # a list in older checkpoints
            trained = record.get(name)
        if trained and standardizes:
            loaded = describe_weight_function(child)
            if trained != loaded:
                report.mismatch(
                    another_function(trained, loaded), prefix + name
                )


def _on_registration(parent: nn.Module, name: str, child) -> None:
    # Looked up in __dict__: wrappers forward attributes they do not have yet.
    if (
        isinstance(child, CheckpointNames)
        or _standardizes(child)
        or (child is not None and '_checkpoint_hooks' in child.__dict__)
    ) and '_checkpoint_hooks' not in parent.__dict__:
        parent.__dict__['_checkpoint_hooks'] = [
            # Without the underscore, and the argument, since torch 2.5.
            parent._register_load_state_dict_pre_hook(
                _before_loading, with_module=True
            ),
            parent.register_load_state_dict_post_hook(_after_loading),
            parent._register_state_dict_hook(_record_weights),
        ]


def forget_names(parent: nn.Module) -> None:
    """Undo what registering a layer of ours did to its parent."""
    for handle in parent.__dict__.pop('_checkpoint_hooks', ()):
        handle.remove()


register_module_module_registration_hook(_on_registration)
