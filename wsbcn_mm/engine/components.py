"""What the names in a config mean: classes, and what they take."""

import copy
import difflib
import functools
import inspect
import warnings
from typing import Any, Dict, Optional, Set

import torch
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import MODELS
from mmengine.utils import get_object_from_string
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layers import BCN
from ..layers._base import check_count
from .update_rate import update_rate

LAZY = (LazyAttr, LazyObject)  # a new-style config's stand-ins for imports


def registered(kind: Any, scope: Optional[str] = None) -> Optional[type]:
    """Return the class that a config's ``type`` means, or None."""
    kind = type_name(kind)
    if isinstance(kind, str):
        if scope and '.' not in kind:
            kind = f'{scope}.{kind}'
        try:
            kind = MODELS.get(kind)
        except RuntimeError:  # nothing of this name
            return None
    return kind if inspect.isclass(kind) else None


def type_name(kind: Any) -> Any:
    """Return the text that names a class in a config.

    New-style configs hold classes, or stand-ins that import them when asked,
    and neither can be dumped. A class gets the name that it is registered
    by, else its import path; one that has neither stays what it is, as does
    text.

    Example:
        >>> type_name(nn.GroupNorm)
        'GN'
    """
    if isinstance(kind, LAZY):
        kind = kind.build()
    if not (inspect.isclass(kind) or inspect.isfunction(kind)):
        return kind
    library = kind.__module__.partition('.')[0]
    own = MODELS.children.get(library)
    for registry, prefix in ((MODELS, ''), (own, f'{library}.')):
        for name, found in registry.module_dict.items() if registry else ():
            if found is kind:
                return prefix + name
    path = f'{kind.__module__}.{kind.__qualname__}'
    return path if get_object_from_string(path) is kind else kind


def class_name(kind: Any) -> str:
    """``'ResNet'`` for 'ResNet', 'mmdet.ResNet' and the class itself."""
    kind = type_name(kind)
    return getattr(kind, '__name__', str(kind).rpartition('.')[2])


def family(component: Optional[type]) -> Set[str]:
    """A class and those that it derives from, as ``'mmdet.ResNet'``."""
    return {
        f'{c.__module__.partition(".")[0]}.{c.__name__}'
        for c in inspect.getmro(component or object)
    }


@functools.lru_cache(maxsize=None)
def constructor_parameters(component: Optional[type]) -> Dict[str, Any]:
    """What the constructor takes, with the defaults.

    A class with ``**kwargs`` takes what the class that it derives from does.
    """
    found = {}
    for owner in inspect.getmro(component or object)[:-1]:
        init = owner.__dict__.get('__init__')
        if init is None:
            continue
        takes_more = False
        for parameter in inspect.signature(init).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                takes_more = True
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                found.setdefault(parameter.name, parameter.default)
        if not takes_more:
            break
    return found


def check_layer(cfg: dict, *args, **kwargs) -> None:
    """Raise if a layer cannot be built from its config.

    Of a class that is not ours only the names of arguments are checked, and
    of one that no library here has, nothing.

    Args:
        cfg (dict): The config, of a registered class.
        args, kwargs: What a network gives its class beside, for a trial on
            the meta device.

    Raises:
        ValueError: If the class has not all the arguments.
        TypeError, ValueError: What the constructor of one of ours says.

    Example:
        >>> check_layer(dict(type='BCN', num_group=16), 64)
        Traceback (most recent call last):
        ValueError: BCN has no argument 'num_group'. Did you mean 'num_groups'?
    """
    cfg = dict(cfg)
    kind = registered(cfg.pop('type'))
    for key in ('requires_grad', '_scope_'):  # others take these out
        cfg.pop(key, None)
    library = kind.__module__.partition('.')[0]
    if library in ('wsbcn_mm', 'mmcv', 'mmengine', 'torch'):
        taken = sorted(constructor_parameters(kind).keys() - {'self'})
        for key in [key for key in cfg if key not in taken]:
            close = difflib.get_close_matches(key, taken, n=1)
            raise ValueError(
                f'{kind.__name__} has no argument {key!r}. '
                + (
                    f'Did you mean {close[0]!r}?'
                    if close
                    else f'It has {", ".join(taken)}'
                )
            )
    if library == 'wsbcn_mm':
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of numbers that are the trial's
            kind(*args, **kwargs, **cfg)


def norm_class(cfg: Any) -> Optional[type]:
    """The class of a normalization's config; None for anything else."""
    if not isinstance(cfg, dict) or 'type' not in cfg:
        return None
    kind = registered(cfg['type'])
    normalizations = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
    if kind and (
        issubclass(kind, normalizations) or 'SyncBatchNorm' in kind.__name__
    ):
        return kind
    return None


def plain_copy(cfg: Any) -> Any:
    """Copy a config into dicts whose ``type`` is text.

    Nothing is left to be merged, so ``_delete_`` has no meaning any more.
    """
    if isinstance(cfg, dict):  # not cfg.items(), which imports lazy objects
        return {
            k: type_name(v) if k == 'type' else plain_copy(v)
            for k, v in dict.items(cfg)
            if k != '_delete_'
        }
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(plain_copy(value) for value in cfg)
    return copy.deepcopy(cfg)


def layer_cfg(cfg: dict) -> dict:
    """Copy the config of a layer, named as it is registered."""
    cfg = plain_copy(cfg)
    if '.' in str(cfg.get('type')):  # as 'wsbcn_mm.BCN'
        cfg['type'] = type_name(registered(cfg['type']) or cfg['type'])
    return cfg


def with_rate(
    norm_cfg: dict, images_per_gpu: int, images_per_update: int
) -> dict:
    """Complete ``norm_cfg`` by what follows from the numbers of images."""
    rate = update_rate(images_per_gpu, images_per_update)
    norm_cfg = layer_cfg(norm_cfg)
    kind = norm_class(norm_cfg)
    if issubclass(kind, BCN):
        if 'momentum' not in norm_cfg:
            # With the batch's own statistics the averages are those of BN.
            batch = not norm_cfg.get('estimate', True)
            norm_cfg['momentum'] = 0.1 if batch else rate
            norm_cfg['momentum_annealing'] = True
    if 'simulated_batch_size' in constructor_parameters(kind):
        batch_size = norm_cfg.setdefault('batch_size', images_per_gpu)
        check_count(kind.__name__, 'batch_size', batch_size)
        # 32 samples, as in the authors' code, in whole batches.
        window = -(-32 // batch_size) * batch_size
        norm_cfg.setdefault('simulated_batch_size', window)
    return norm_cfg
