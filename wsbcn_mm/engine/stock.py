"""A trained model for a machine that does not have this package.

Folded into convolutions, a batch affine needs their bias, and the blocks of
the MM libraries build convolutions without one wherever a normalization
follows. What they can be told to build instead is mmcv's own ``ConvModule``:
a plain convolution and a BatchNorm, which holds the batch affine. So a BCN
becomes ``conv_cfg=dict(type='ConvModule', norm_cfg=dict(type='BN'))`` and
``norm_cfg=dict(type='GN')``: stock layers throughout. mmcv's ``fuse_conv_bn``
then makes of it what :func:`wsbcn_mm.fold_for_inference` makes.
"""

import copy
from typing import Any, Dict

import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn

from ..deploy import as_batch_norm, as_group_norm, is_ours
from ..feeding import find_feeding_convolutions
from ..layers import BCN
from ..layers._base import NormBase

BCN_TYPES = ('BCN', 'SyncBCN')
BATCH_TYPES = ('MABN', 'BGN')
CONV_TYPES = ('ConvWS', 'ConvWN', 'ConvCWN', 'CenConv')


class NotExpressible(ValueError):
    """A model that no config of stock layers describes."""


def stock_model_config(model_cfg: dict) -> ConfigDict:
    """A model config without our layers, for :func:`stock_state_dict`.

    Args:
        model_cfg (dict): A model config. It is not changed.

    Raises:
        NotExpressible: If something of ours is left in it.
    """
    cfg = _convert(copy.deepcopy(model_cfg))
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


def _convert(cfg: Any) -> Any:
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_convert(c) for c in cfg)
    if not isinstance(cfg, dict):
        return cfg
    for key, value in list(cfg.items()):
        if key == 'init_cfg' and _name_of(value) == 'Pretrained':
            cfg[key] = None
        elif key == 'pretrained' and isinstance(value, str):
            cfg[key] = None
        elif not ('norm_cfg' in key and isinstance(value, dict)):
            cfg[key] = _convert(value)
    if _name_of(cfg.get('conv_cfg')) in CONV_TYPES:
        cfg['conv_cfg'] = None
    for key, value in list(cfg.items()):
        if 'norm_cfg' not in key:
            continue
        eps = value.get('eps', 1e-5) if isinstance(value, dict) else None
        if _name_of(value) in BCN_TYPES:
            groups = value.get('num_groups', 32)
            cfg[key] = dict(type='GN', num_groups=groups, eps=eps)
            if key == 'norm_cfg':
                cfg['conv_cfg'] = dict(
                    type='ConvModule',
                    norm_cfg=dict(type='BN', eps=eps),
                    act_cfg=None,
                )
        elif _name_of(value) in BATCH_TYPES:
            cfg[key] = dict(type='BN', eps=eps)
    return cfg


def _name_of(cfg: Any):
    return cfg.get('type') if isinstance(cfg, dict) else None


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
    own = {cfg['type']} if isinstance(cfg.get('type'), str) else set()
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
            new = as_group_norm(module)
            found = stock.get_submodule(target)
            if found.num_groups != new.num_groups:
                raise NotExpressible(
                    f'{name} has {new.num_groups} groups, others of its '
                    f'component {found.num_groups}: GN takes one number for '
                    f'all. {ADVICE}'
                )
            _add(state, target, new)
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
    result = {}
    for name, feeding in find_feeding_convolutions(model).items():
        norm = model.get_submodule(name)
        if not isinstance(norm, BCN):
            continue
        conv = feeding.convolution
        if not feeding.exclusive or not isinstance(
            _counterpart(model, stock, conv), ConvModule
        ):
            why = feeding.reason or f'{conv} is always a plain convolution'
            raise NotExpressible(
                f'the batch affine of {name} has no place in a config of '
                f'stock layers: {why}. {ADVICE}'
            )
        result[conv] = as_batch_norm(norm)
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
        package, and its model.

    Raises:
        NotExpressible: If there is none.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model = stock_model_config(cfg.model)
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
    try:
        stock = MODELS.build(cfg.model)
    except ValueError as error:
        if 'divisible by num_groups' not in str(error):
            raise
        raise NotExpressible(
            'the number of groups does not divide the channels of every '
            f'layer, so that they have different ones: GN takes one. {ADVICE}'
        ) from error
    stock.load_state_dict(stock_state_dict(model, stock))
    left = [n for n, m in stock.named_modules() if is_ours(m)]
    if left:
        raise NotExpressible(f'{left[0]} is a layer of wsbcn_mm. {ADVICE}')
    return cfg, stock.eval()
