"""Layers that no config reaches, converted by config all the same."""

import copy
import re
import warnings
from typing import Any, Optional

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from .convert import ConversionReport, convert_to_micro_batch
from .engine.components import LAZY, norm_class
from .engine.config import GN_WS_CHECKPOINTS
from .engine.random_state import preserved_random_state
from .layers._conv_base import ConvBase

_NAMES_CHECKPOINT = re.compile('pretrained|checkpoint|ckpt')


@MODELS.register_module(name='ConvertedModel', force=True)
def converted_model(conversion: dict, **model_cfg) -> nn.Module:
    """Build a model, then :func:`convert_to_micro_batch` it.

    What ``micro_batch_model`` asks for where a config does not reach all. The
    model is that of the config without ``conversion``, so nothing else sees
    that it was built this way.

    Args:
        conversion (dict): ``model_type``, the type of the model,
            ``norm_cfg`` and ``conv_cfg`` of :func:`convert_to_micro_batch`,
            and ``pretrained`` of ``micro_batch_model``, if given.
        **model_cfg: All else in the config of the model.

    Returns:
        nn.Module: The converted model. What was changed is logged, which
        Batch Normalizations were not, and which convolutions standardize
        where something else than a normalization follows.
    """
    built = MODELS.build({**model_cfg, 'type': conversion['model_type']})
    standardized = {m for m in built.modules() if isinstance(m, ConvBase)}
    norm = norm_class(conversion['norm_cfg'])
    with warnings.catch_warnings():
        if any(isinstance(m, norm) for m in built.modules()):
            warnings.filterwarnings('ignore', '.*nothing to convert')
        built, report = convert_to_micro_batch(
            built,
            conversion['norm_cfg'],
            conversion['conv_cfg'],
            return_report=True,
        )
    left = [e for e in report.left if e.kind == 'batch norm']
    left += [e for e in report.misplaced if e not in left]
    report = ConversionReport(report.changed, left)
    if report.changed or report.left:
        print_log(f'Converted once built:\n{report}', logger='current')
    if conversion.get('pretrained') is not True:
        for name, part in built.named_modules():
            own = {m for m in part.modules() if isinstance(m, ConvBase)}
            if own and own.isdisjoint(standardized):
                _drop_checkpoints(name, part, conversion.get('pretrained'))
                if _config_of(name, model_cfg).get('pretrained') is True:
                    warnings.warn(
                        f'{name} keeps the weights that its class loads by '
                        'itself (pretrained=True), though it standardizes '
                        'them now that it is converted, which changes what '
                        'they compute. To start from scratch: '
                        'micro_batch_model(pretrained=False)',
                        stacklevel=2,
                    )
    return built


def _config_of(name: str, cfg: Any) -> dict:
    """Return the config that a module was built from; {} if it has none."""
    for key in name.split('.'):
        if isinstance(cfg, (list, tuple)) and key.isdigit():
            cfg = dict(enumerate(cfg)).get(int(key))
        else:
            cfg = cfg.get(key) if isinstance(cfg, dict) else None
    return cfg if isinstance(cfg, dict) else {}


def _drop_checkpoints(
    name: str, part: nn.Module, pretrained: Optional[str]
) -> None:
    """Let a part start from scratch that only now standardizes weights."""
    init_cfg = getattr(part, 'init_cfg', None)
    inits = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    inits = [init for init in inits if isinstance(init, dict)]
    kept = (pretrained, *GN_WS_CHECKPOINTS.values())
    useless = [
        init
        for init in inits
        if init.get('checkpoint') and init['checkpoint'] not in kept
    ]
    if useless:
        part.init_cfg = [init for init in inits if init not in useless]
        warnings.warn(
            f'{name or "the model"} starts from scratch, not from '
            f'{useless[0]["checkpoint"]!r}: it standardizes its weights now '
            'that it is converted, which changes what those of the '
            'checkpoint compute. To choose: micro_batch_model(pretrained='
            'True) (all checkpoints stay), False (from scratch), or the name '
            'of a checkpoint for the backbone',
            stacklevel=2,
        )


def try_conversion(
    model_cfg: dict,
    scope: Optional[str],
    norm_cfg: dict,
    conv_cfg: dict,
) -> ConversionReport:
    """Find out what conversion would change in the model of a config.

    The model is built for it, without memory for its parameters where its
    constructor allows that, and without any checkpoint.

    Args:
        model_cfg (dict): The config. It is not changed.
        scope (str | None): The library whose names it uses.
        norm_cfg, conv_cfg (dict): Those of :func:`convert_to_micro_batch`.

    Raises:
        Exception: Whatever the constructor of the model raises.
    """
    with preserved_random_state(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for device in ('meta', 'cpu'):
            try:
                with (
                    torch.device(device),
                    DefaultScope.overwrite_default_scope(scope),
                ):
                    model = MODELS.build(_without_checkpoints(model_cfg))
                break
            except Exception:  # such as .item() on the meta device
                if device == 'cpu':
                    raise
        return convert_to_micro_batch(model, norm_cfg, conv_cfg, dry_run=True)


def _without_checkpoints(cfg: Any) -> Any:
    """Copy a config, without what its model would load when it is built."""
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_without_checkpoints(part) for part in cfg)
    if not isinstance(cfg, dict):
        return cfg.build() if isinstance(cfg, LAZY) else copy.deepcopy(cfg)
    result = ConfigDict()
    for key, value in dict.items(cfg):
        if 'pretrained' in key and value is True:
            value = False
        elif isinstance(value, str) and _NAMES_CHECKPOINT.search(key):
            value = None
        result[key] = _without_checkpoints(value)
    return result
