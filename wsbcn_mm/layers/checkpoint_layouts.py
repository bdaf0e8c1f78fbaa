"""Read other normalizations' checkpoints as BCN's."""

from typing import Dict, Optional

import torch
from torch import Tensor

from .checkpoint_report import current_report

ESTIMATES = ('running_mean', 'running_var')
AFFINE = ('weight', 'bias')
AUTHORS_PARTS = ('bn', 'pbn')  # what the authors call the batch part
AFFINE_AVERAGED = (
    'A checkpoint with one output affine for each channel is loaded into BCN '
    "with channel_affine='group': the affines of a group are averaged, so "
    "the outputs are not those of the checkpoint. Set channel_affine='channel'"
    ' in norm_cfg to keep them.'
)
FROZEN = (
    'A checkpoint without a channel part (BN, MABN or BGN) is loaded into '
    'frozen layers, whose new channel part is never trained: the outputs stay '
    'other than those of the checkpoint. Train these layers (frozen_stages=-1,'
    ' and no requires_grad=False in norm_cfg), or keep their normalization.'
)


def authors_weight_function(state_dict: Dict[str, Tensor]) -> Optional[dict]:
    """Return how the authors' code standardized the weights of a checkpoint.

    Their ImageNet code adds eps inside the square root, their DeepLabV3 code
    outside: ``imagenet/models/layers.py`` and ``DeepLabV3/deeplab.py`` in
    https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization.

    Args:
        state_dict (dict[str, Tensor]): A whole checkpoint.

    Returns:
        dict | None: The function's name and settings; None for one that
        is not of that code.
    """
    if not any(key.endswith('pbn.running_mean') for key in state_dict):
        return None
    is_deeplab = any('aspp' in key for key in state_dict)
    return dict(
        function='standardize_weight', eps=1e-5, eps_inside_sqrt=not is_deeplab
    )


def translate_to_bcn(layer, state_dict: Dict[str, Tensor], prefix: str):
    """Rewrite a layer's part of a checkpoint in place.

    Understood are the authors' BCN, and BN, BGN, MABN and GN. The authors
    call the batch part ``bn`` in one release and ``pbn`` in their ImageNet
    and DeepLabV3 code (https://github.com/joe-siyuan-qiao/
    Batch-Channel-Normalization).

    Args:
        layer (BCN): The layer that is to load it.
        state_dict (dict[str, Tensor]): The checkpoint.
        prefix (str): What its keys begin with.
    """
    found = {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    if 'batch_weight' not in found and 'weight' in found:
        part = next(
            (p for p in AUTHORS_PARTS if f'{p}.running_mean' in found), None
        )
        if part:
            new, what = _from_authors(found, part), "the authors' BCN"
        elif 'running_mean' in found and 'bias' in found:
            new = _from_batch_norm(layer, found)
            what = (
                'BN, into the batch part (the channel part is new, so the '
                'outputs are not those of the checkpoint until it is trained)'
            )
        elif 'running_var' in found and 'bias' in found:
            found['running_mean'] = torch.zeros_like(found['running_var'])
            new = _from_batch_norm(layer, found)
            what = 'MABN, into the batch part (the channel part is new)'
        elif 'bias' in found:
            new = _from_group_norm(layer, found)
            what = (
                'GN, into the channel part (the outputs stay the same; '
                'CalibrateEstimatesHook keeps them so as training begins)'
            )
        else:
            return
        if 'running_var' in found and not layer.weight.requires_grad:
            current_report().mismatch(FROZEN, prefix)
        else:
            current_report().take(what, prefix)
        for name in found:
            state_dict.pop(prefix + name, None)
        state_dict.update({prefix + k: v for k, v in new.items()})
    _fit_affine(layer, state_dict, prefix)


def _from_authors(found, part: str):
    new = {f'batch_{name}': found[f'{part}.{name}'] for name in AFFINE}
    new.update({name: found[f'{part}.{name}'] for name in ESTIMATES})
    # Their update rate is the optimization's business, not the function's.
    new.update({name: found[name].flatten() for name in AFFINE})
    new['num_batches_tracked'] = _count(found, f'{part}.num_batches_tracked')
    return new


def _from_batch_norm(layer, found):
    new = {f'batch_{name}': found[name] for name in AFFINE}
    for name in ESTIMATES:  # BGN's are those of groups
        repeats = layer.num_features // max(len(found[name]), 1)
        new[name] = found[name].repeat_interleave(max(repeats, 1))
    # Of the checkpoint's device: with assign=True they replace the layer's.
    new['weight'] = found['weight'].new_ones(layer.weight.shape)
    new['bias'] = found['weight'].new_zeros(layer.bias.shape)
    new['num_batches_tracked'] = _count(found)
    return new


def _from_group_norm(layer, found):
    """A batch part that leaves its input as it is."""
    weight, channels = found['weight'], layer.num_features
    # In the layer's dtype: half precision, which a checkpoint may have, knows
    # no 1 - eps.
    estimates = dict(device=weight.device, dtype=layer.running_var.dtype)
    return dict(
        {name: found[name] for name in AFFINE},
        batch_weight=weight.new_ones(channels),
        batch_bias=weight.new_zeros(channels),
        running_mean=torch.zeros(channels, **estimates),
        running_var=torch.full((channels,), 1 - layer.eps, **estimates),
        num_batches_tracked=_count(found) + layer.loaded_count,
    )


def _count(found, name: str = 'num_batches_tracked') -> Tensor:
    if name in found:
        return found[name]
    return found['weight'].new_zeros((), dtype=torch.long)


def _fit_affine(layer, state_dict, prefix: str) -> None:
    """Between one output affine a group and one a channel."""
    for name in AFFINE:
        key, own = prefix + name, len(getattr(layer, name))
        value = state_dict.get(key)
        if value is None or value.dim() != 1 or len(value) == own:
            continue
        if len(value) == layer.num_groups:
            state_dict[key] = value.repeat_interleave(own // len(value))
        elif len(value) == layer.num_features:
            groups = value.view(own, -1)
            state_dict[key] = groups.mean(1)
            if not torch.equal(groups, groups[:, :1].expand_as(groups)):
                current_report().mismatch(AFFINE_AVERAGED, key)
