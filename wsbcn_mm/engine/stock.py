"""A trained model for a machine that does not have this package.

Folded into convolutions, a batch affine needs their bias, and the blocks of
the MM libraries build convolutions without one wherever a normalization
follows. What they can be told to build instead is mmcv's own ``ConvModule``:
a plain convolution and a BatchNorm, which holds the batch affine. So a BCN
becomes ``conv_cfg=dict(type='ConvModule', norm_cfg=dict(type='BN'))`` and
``norm_cfg=dict(type='GN')``: stock layers throughout. mmcv's ``fuse_conv_bn``
then makes of it what :func:`wsbcn_mm.fold_for_inference` makes.

Some components cannot be told so: the separable convolutions of DeepLabV3+
take no ``conv_cfg``. Their norm_cfg is :data:`NORM_OF_CONFIG`, a few lines of
plain PyTorch that the written config carries itself.
"""

import copy
from typing import Any, Collection, Dict, List, Optional, Tuple

import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn

from ..feeding import find_feeding_convolutions
from ..layers import BCN
from ..layers._base import NormBase
from ..stock_layers import (
    as_batch_norm,
    as_group_norm,
    check_batch_affines,
    is_ours,
)
from .components import class_name
from .config import unconverted

BCN_TYPES = ('BCN', 'SyncBCN')
BATCH_TYPES = ('MABN', 'BGN')
CONV_TYPES = ('ConvWS', 'ConvWN', 'ConvCWN', 'CenConv')


# What a BCN is at inference, for the head of a config.
NORM_OF_CONFIG = '''\
# The copies that mmengine makes of a config, as in work_dirs, lack the class
# below: load this file, not one of them.
_base_ = []  # says to mmengine that types are text here, not lazy objects

from mmengine import registry
from torch import nn


@registry.MODELS.register_module(force=True)
class BatchGroupNorm(nn.Sequential):
    """A BatchNorm, as it is at inference, and a GroupNorm."""

    _abbr_ = 'gn'

    def __init__(self, num_features, num_groups, eps=1e-5):
        fitting = [
            n for n in range(1, num_groups + 1) if num_features % n == 0
        ]
        super().__init__(
            nn.BatchNorm2d(num_features, eps),
            nn.GroupNorm(fitting[-1], num_features, eps),
        )


del BatchGroupNorm  # of the registry, not of the config
'''


class NotExpressible(ValueError):
    """A model that no config of stock layers describes.

    Args:
        message (str): Why.
        modules (Collection[str]): The BCNs whose batch affine has no place,
            if that is why. Default: none
    """

    def __init__(self, message: str, modules: Collection[str] = ()):
        super().__init__(message)
        self.modules = modules


def stock_model_config(
    model_cfg: dict, whole: Collection[str] = ()
) -> ConfigDict:
    """A model config without our layers, for :func:`stock_state_dict`.

    Args:
        model_cfg (dict): A model config. It is not changed.
        whole (Collection[str]): Components, as ``'decode_head'``, whose BCN
            stays in one piece, of the class in :data:`NORM_OF_CONFIG`.
            Default: none

    Raises:
        NotExpressible: If something of ours is left in it.
    """
    cfg = _convert(copy.deepcopy(model_cfg), whole)
    left = sorted(_types(cfg) & _our_types())
    if left:
        raise NotExpressible(
            f'the config has {", ".join(left)} where no stock layer can '
            f'take the place. {ADVICE}'
        )
    return cfg


ADVICE = (
    'Export the folded model instead: --onnx for a segmentor or a classifier, '
    'or wsbcn_mm.fold_for_inference(model) and torch.export.'
)


def _convert(cfg: Any, whole: Collection[str], path: str = '') -> Any:
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(
            _convert(c, whole, _join(path, i)) for i, c in enumerate(cfg)
        )
    if not isinstance(cfg, dict):
        return cfg
    for key, value in list(cfg.items()):
        if key == 'init_cfg' and _name_of(value) == 'Pretrained':
            cfg[key] = None
        elif key == 'pretrained' and isinstance(value, str):
            cfg[key] = None
        elif not ('norm_cfg' in key and isinstance(value, dict)):
            cfg[key] = _convert(value, whole, _join(path, key))
    if _name_of(cfg.get('conv_cfg')) in CONV_TYPES:
        cfg['conv_cfg'] = None
    for key, value in list(cfg.items()):
        if 'norm_cfg' not in key:
            continue
        eps = value.get('eps', 1e-5) if isinstance(value, dict) else None
        if _name_of(value) in BCN_TYPES:
            kind = 'BatchGroupNorm' if path in whole else 'GN'
            cfg[key] = dict(type=kind, num_groups=_num_groups(value), eps=eps)
            if key == 'norm_cfg' and path not in whole:
                cfg['conv_cfg'] = dict(
                    type='ConvModule',
                    norm_cfg=dict(type='BN', eps=eps),
                    act_cfg=None,
                )
        elif _name_of(value) in BATCH_TYPES:
            cfg[key] = dict(type='BN', eps=eps)
    return cfg


def _join(path: str, key) -> str:
    return f'{path}.{key}' if path else str(key)


def _component(model_cfg: dict, name: str) -> Optional[Tuple[str, dict]]:
    """The innermost component around a module that names a BCN.

    Returns:
        tuple[str, dict] | None: Its path, and its config.
    """
    cfg, path, found = model_cfg, '', None
    for part in [*name.split('.'), None]:
        if isinstance(cfg, dict) and _bcn_cfgs(cfg):
            found = path, cfg
        if isinstance(cfg, (list, tuple)) and str(part).isdigit():
            cfg = cfg[int(part)]
        elif isinstance(cfg, dict) and part in cfg:
            cfg = cfg[part]
        else:
            break
        path = _join(path, part)
    return found


def _bcn_cfgs(cfg: dict) -> List[dict]:
    return [v for v in cfg.values() if _name_of(v) in BCN_TYPES]


def _num_groups(norm_cfg: dict) -> int:
    return norm_cfg.get('num_groups', 32)


def _name_of(cfg: Any):
    """The class that a config names, without a prefix or a path."""
    named = isinstance(cfg, dict) and 'type' in cfg
    return class_name(cfg['type']) if named else None


def _our_types() -> set:
    """Names that are registered by this package."""
    package = __name__.split('.')[0]
    return {
        name
        for registry in (MODELS, HOOKS)
        for name, registered in registry.module_dict.items()
        if registered.__module__.split('.')[0] == package
    }


def _types(cfg: Any) -> set:
    if isinstance(cfg, (list, tuple)):
        return set().union(*map(_types, cfg))
    if not isinstance(cfg, dict):
        return set()
    own = {_name_of(cfg)} if isinstance(cfg.get('type'), str) else set()
    return own.union(*(_types(v) for v in cfg.values()))


@torch.no_grad()
def stock_state_dict(model: nn.Module, stock: nn.Module) -> Dict[str, Tensor]:
    """The weights of a model for one built by :func:`stock_model_config`.

    Args:
        model (nn.Module): The trained model.
        stock (nn.Module): The same, of stock layers. It is not changed.

    Raises:
        NotExpressible: If a layer has no counterpart.
    """
    affines = _affines_of_convolutions(model, stock)
    state = {}
    for name, module in model.named_modules():
        target = _stock_name(model, name)
        if isinstance(module, BCN):
            place = stock.get_submodule(target)
            if isinstance(place, nn.Sequential):  # a BatchGroupNorm
                _add(state, f'{target}.0', as_batch_norm(module))
                target = f'{target}.1'
            elif not isinstance(place, nn.GroupNorm):
                raise NotExpressible(
                    f'{name} is a BCN where, whatever the config says, there '
                    f'would be a {type(place).__name__}. {ADVICE}'
                )
            _add(state, target, as_group_norm(module))
        elif isinstance(module, NormBase):
            _add(state, target, as_batch_norm(module))
        elif hasattr(module, 'standardized_weight') or name in affines:
            weight = (
                module.standardized_weight()
                if hasattr(module, 'standardized_weight')
                else module.weight
            )
            prefix, bias = target, module.bias
            if name in affines:
                prefix = f'{target}.conv'
                if stock.get_submodule(prefix).bias is None and (
                    bias is not None
                ):
                    affines[name].running_mean -= bias
                    bias = None
                _add(state, f'{target}.bn', affines[name])
            state[f'{prefix}.weight'] = weight.detach().clone()
            if bias is not None:
                state[f'{prefix}.bias'] = bias.detach().clone()
        elif not _is_inside(model, name):
            for key, value in [
                *module._parameters.items(),
                *module._buffers.items(),
            ]:
                if (
                    value is not None
                    and key not in module._non_persistent_buffers_set
                ):
                    state[f'{target}.{key}' if target else key] = (
                        value.detach().clone()
                    )
    return state


def _add(state: Dict[str, Tensor], prefix: str, layer: nn.Module) -> None:
    state.update({f'{prefix}.{k}': v for k, v in layer.state_dict().items()})


def _is_inside(model: nn.Module, name: str) -> bool:
    """Whether a module is part of a normalization of ours."""
    parent = name.rpartition('.')[0]
    return bool(parent) and isinstance(model.get_submodule(parent), NormBase)


def _stock_name(model: nn.Module, name: str) -> str:
    """``bcn1`` is ``gn1`` where its type is GN."""
    parts, module = name.split('.') if name else [], model
    for i, part in enumerate(parts):
        module = module._modules[part]
        if isinstance(module, NormBase) and part.startswith(module._abbr_):
            new = 'gn' if isinstance(module, BCN) else 'bn'
            parts[i] = new + part[len(module._abbr_) :]
    return '.'.join(parts)


def _affines_of_convolutions(
    model: nn.Module, stock: nn.Module
) -> Dict[str, nn.BatchNorm2d]:
    """What the ``ConvModule`` in a convolution's place has for a BN."""
    result, without_place = {}, {}
    for name, feeding in find_feeding_convolutions(model).items():
        norm = model.get_submodule(name)
        if not isinstance(norm, BCN) or not isinstance(
            stock.get_submodule(_stock_name(model, name)), nn.GroupNorm
        ):
            continue
        conv = feeding.convolution
        if not feeding.exclusive or not isinstance(
            _counterpart(model, stock, conv), ConvModule
        ):
            without_place[name] = (
                feeding.reason or f'{conv} is always a plain convolution'
            )
        else:
            result[conv] = as_batch_norm(norm)
    if without_place:
        name, why = next(iter(without_place.items()))
        raise NotExpressible(
            f'the batch affine of {name} has no place in a config of '
            f'stock layers: {why}. {ADVICE}',
            modules=without_place,
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name not in result:
            if isinstance(_counterpart(model, stock, name), ConvModule):
                result[name] = _identity(module.out_channels)
    return result


def _counterpart(model, stock, name: str):
    if isinstance(model.get_submodule(name), ConvModule):
        return None
    try:
        return stock.get_submodule(_stock_name(model, name))
    except AttributeError:
        return None


def _identity(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.running_var.fill_(1 - norm.eps)
    return norm


def stock_model(cfg: Config, model: nn.Module):
    """Build, fill and check the stock counterpart of a trained model.

    Args:
        cfg (Config): The whole config that ``model`` was built from.
        model (nn.Module): The trained model.

    Returns:
        tuple[Config, nn.Module]: A config that needs nothing of this
        package, and its model. The file of a config with a
        ``BatchGroupNorm`` has to begin with :data:`NORM_OF_CONFIG`:
        :func:`config_text` sees to it.

    Raises:
        NotExpressible: If there is none.
        NotReplaceable: If a layer computes what no stock layer does.
    """
    check_batch_affines(model)
    cfg = copy.deepcopy(cfg)
    cfg.model = unconverted(cfg.model)
    whole = set(_of_several_group_numbers(cfg.model, model))
    while True:
        model_cfg = stock_model_config(cfg.model, whole)
        try:
            stock = _filled(model_cfg, model)
            break
        except NotExpressible as error:
            found = [_component(cfg.model, name) for name in error.modules]
            paths = {component and component[0] for component in found}
            if not paths or None in paths or paths & whole:
                raise
            whole |= paths
    cfg.model = model_cfg
    for key in ('custom_imports', 'load_from', 'resume'):
        cfg.pop(key, None)
    ours = _our_types()
    cfg.custom_hooks = [
        hook
        for hook in cfg.get('custom_hooks') or []
        if _name_of(hook) not in ours
    ]
    for key in list(cfg):  # variables, as norm_cfg, that the model was made of
        if key != 'model' and _types(cfg[key]) & ours:
            cfg.pop(key)
    left = [n for n, m in stock.named_modules() if is_ours(m)]
    if left:
        raise NotExpressible(f'{left[0]} is a layer of wsbcn_mm. {ADVICE}')
    return cfg, stock.eval()


def _of_several_group_numbers(model_cfg: dict, model: nn.Module):
    """Components where a BCN took fewer groups; GN has one number for all."""
    for name, module in model.named_modules():
        found = isinstance(module, BCN) and _component(model_cfg, name)
        if found and module.num_groups not in {
            _num_groups(norm_cfg) for norm_cfg in _bcn_cfgs(found[1])
        }:
            yield found[0]


def _filled(model_cfg: dict, model: nn.Module) -> nn.Module:
    """The stock model of a config, with the weights of ``model``."""
    exec(NORM_OF_CONFIG, {'__name__': 'config'})
    stock = MODELS.build(model_cfg)
    stock.load_state_dict(stock_state_dict(model, stock))
    return stock


def brings_norm(cfg: Config) -> bool:
    """Whether the config's file has to begin with :data:`NORM_OF_CONFIG`."""
    return 'BatchGroupNorm' in _types(cfg.model)


def config_text(cfg: Config) -> str:
    """The file of a config that :func:`stock_model` returned."""
    text = cfg.pretty_text
    return f'{NORM_OF_CONFIG}\n{text}' if brings_norm(cfg) else text
