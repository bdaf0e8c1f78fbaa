"""Any zoo config's model, made ready for one or two images per GPU."""

import copy
import functools
import inspect
import math
import os.path as osp
import re
import warnings
from dataclasses import replace
from typing import Any, Dict, Iterable, Optional, Set, Tuple, Union

from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import nn

from ..layers import BCN
from ..layers._conv_base import PLAIN_CONVOLUTION
from .components import (
    check_layer,
    class_name,
    constructor_parameters,
    family,
    layer_cfg,
    norm_class,
    plain_copy,
    registered,
    with_rate,
)
from .update_rate import check_images

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')

# Parts of a model config that hold no layers.
OTHER_PARTS = ('data_preprocessor', 'train_cfg', 'test_cfg')

# The zoo's GN+WS configs start from the right one where its BN configs start
# from the left one: the same network, trained on images prepared alike.
GN_WS_CHECKPOINTS = {
    'torchvision://resnet50': 'open-mmlab://jhu/resnet50_gn_ws',
    'torchvision://resnet101': 'open-mmlab://jhu/resnet101_gn_ws',
    'open-mmlab://resnext50_32x4d': 'open-mmlab://jhu/resnext50_32x4d_gn_ws',
    'open-mmlab://resnext101_32x4d': (
        'open-mmlab://jhu/resnext101_32x4d_gn_ws'
    ),
}

# What follows are exceptions, by library and class, derived classes included.

# Their form in the paper and in the zoo's gn+ws folder normalizes the neck
# and the heads too, which otherwise stay without a normalization.
NORMALIZED_HEADS = {'mmdet.FasterRCNN', 'mmdet.MaskRCNN'}

# Their normalizations see vectors, (N, C), not feature maps.
VECTOR_NORMALIZATIONS = {
    'mmdet.LinearReIDHead',
    'mmpretrain.LeViTClsHead',
    'mmpretrain.LinearNeck',
    'mmpretrain.NonLinearNeck',
    'mmpretrain.StackedLinearClsHead',
    'mmpretrain.SwAVNeck',
}

# Their owner hands its own norm_cfg and conv_cfg on to them.
HANDED_DOWN = {'mmseg.DeconvModule', 'mmseg.InterpConv'}

# Parts without a type, and what is built from them.
IMPLIED_TYPES = {
    ('mmdet.SOLOV2Head', 'mask_feature_head'): (
        'mmdet.models.dense_heads.solov2_head.MaskFeatModule'
    ),
    ('mmdet.CondInstMaskHead', 'mask_feature_head'): (
        'mmdet.models.dense_heads.condinst_head.MaskFeatModule'
    ),
}

# The narrowest layer, where one norm_cfg serves layers of several widths.
NARROWEST = {'mmseg.DepthwiseSeparableASPPHead': 'c1_channels'}


def micro_batch_model(
    model_cfg: dict,
    norm_cfg: Optional[dict] = None,
    conv_cfg: Optional[dict] = None,
    images_per_gpu: int = 1,
    images_per_update: int = 16,
    pretrained: Union[bool, str, None] = None,
    convert: Optional[bool] = None,
) -> ConfigDict:
    """Make a model config train with one or two images per GPU.

    Every Batch, Instance and Group Normalization is replaced by ``norm_cfg``,
    whether the config names it or a class has it by default, and the
    convolutions before them by ``conv_cfg``. Mask R-CNN and Faster R-CNN get
    the paper's form: FPN, four convolutions in the box head, and the mask
    head, all normalized. ``norm_eval`` and frozen stages, which suit a
    pretrained BN only, are switched off. Left as they are: layer
    normalizations, convolutions without a normalization (RPN, output layers),
    deconvolutions, deformable and other special convolutions, and components
    that are not normalized by default.

    In a config file the result replaces the base's model; it is not merged
    with it. The ``_base_`` line has to come first.

    .. code-block:: python

        _base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
        from wsbcn_mm import micro_batch_model
        model = micro_batch_model(_base_.model)

    In a new-style config file, where mmengine puts off every import,
    ``build()`` says that this one is wanted now:

    .. code-block:: python

        from mmengine.config import read_base
        with read_base():
            from .retinanet_r50_fpn_1x_coco import *
        from wsbcn_mm import micro_batch_model
        model = micro_batch_model.build()(model)

    Args:
        model_cfg (dict): A model config of MMDetection, MMSegmentation or
            MMPretrain. It is not changed.
        norm_cfg (dict | None): The normalization. The update rate of a BCN,
            annealed, and the batch sizes of a MABN follow from the two
            numbers below unless given. Default: None,
            ``dict(type='BCN', num_groups=32)``
        conv_cfg (dict | None): The convolution where a normalization follows,
            ``dict(type='Conv2d')`` for none with Weight Standardization.
            Default: None, ``dict(type='ConvWS')``
        images_per_gpu (int): Images in one forward pass: the ``batch_size``
            of the train dataloader, times the number of processes if they
            share their estimates (``SyncEstimatesHook``). Default: 1
        images_per_update (int): Images in one optimizer step, over all
            processes and accumulated passes. Default: 16
        pretrained (bool | str | None): What becomes of ImageNet checkpoints.
            Those of networks without Weight Standardization are of no use
            with it, since it changes what the weights compute. None: they are
            replaced by their GN+WS counterpart where the zoo has one (plain
            ResNet-50/101, ResNeXt-50/101 32x4d) and otherwise removed, each
            with a warning. A string: the backbone starts from this
            checkpoint. False: everything starts from scratch. True: all stay
            as they are. Default: None
        convert (bool | None): Whether to convert, once the model is built,
            the Batch Normalization and the convolutions that no config
            reaches because a class has them built in. The result's type is
            ``ConvertedModel`` then, all else being where it was. Default:
            None, where a trial build shows such layers, or where the model
            cannot be built yet, as with a class that is still to be imported

    Returns:
        ConfigDict: The new model config. A BCN that starts from a GN
        checkpoint has ``channel_affine='channel'``, so that the function of
        the checkpoint is kept. A backbone that lost its checkpoint has
        ``zero_init_residual=False``, as the zoo's from-scratch configs.

    Raises:
        TypeError: If a config is not a dict, or an argument, here or of a
            layer, of another type.
        ValueError: If a config has no ``type``, the model nothing to replace,
            ``norm_cfg`` or ``conv_cfg`` names something else, or an argument
            that the layer has not, or a value is impossible.

    Example:
        >>> model = dict(type='ImageClassifier',
        ...              backbone=dict(type='ResNet', depth=50))
        >>> model = micro_batch_model(model)
        >>> model.backbone.norm_cfg  # doctest: +NORMALIZE_WHITESPACE
        {'type': 'BCN', 'num_groups': 32, 'momentum': 0.000625,
        'momentum_annealing': True}
        >>> model.backbone.conv_cfg
        {'type': 'ConvWS'}
    """
    _check_config('model_cfg', model_cfg, "dict(type='MaskRCNN', ...)")
    if norm_cfg is None:
        norm_cfg = dict(type='BCN', num_groups=32)
    _check_config('norm_cfg', norm_cfg, "dict(type='BCN', num_groups=32)")
    norm_cfg = layer_cfg(norm_cfg)
    if norm_class(norm_cfg) is None:
        raise ValueError(
            'micro_batch_model: norm_cfg must name a normalization of feature '
            f"maps, such as 'BCN' or 'GN'; got type={norm_cfg['type']!r}"
        )
    if conv_cfg is None:
        conv_cfg = dict(type='ConvWS')
    _check_config('conv_cfg', conv_cfg, "dict(type='ConvWS')")
    conv_cfg = layer_cfg(conv_cfg)
    conv_class = registered(conv_cfg['type'])
    if conv_class is None or 'conv' not in conv_class.__name__.lower():
        raise ValueError(
            'micro_batch_model: conv_cfg must name a convolution, such as '
            f"'ConvWS' or 'Conv2d'; got type={conv_cfg['type']!r}"
        )
    if not isinstance(pretrained, (bool, str, type(None))):
        raise TypeError(
            'micro_batch_model: pretrained must be True, False, None or the '
            f'name of a checkpoint; got {pretrained!r}'
        )
    if not isinstance(convert, (bool, type(None))):
        raise TypeError(
            'micro_batch_model: convert must be True, False or None; got '
            f'{convert!r}'
        )
    check_images('micro_batch_model', images_per_gpu, images_per_update)
    try:
        norm_cfg = with_rate(norm_cfg, images_per_gpu, images_per_update)
        check_layer(norm_cfg, 64)
        check_layer(conv_cfg, 64, 64, 3, bias=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f'micro_batch_model: {error}') from error
    result = plain_copy(model_cfg)
    if is_converted(result) and convert is None:
        convert = True
    result = unconverted(result)
    conversion = _Conversion(norm_cfg, conv_cfg, pretrained, convert)
    result = conversion.convert(result, _scope(result))
    if not conversion.norms and not conversion.converts_once_built:
        raise ValueError(
            f'micro_batch_model: found no normalization to replace in '
            f'type={class_name(model_cfg["type"])!r}: neither a norm_cfg of '
            'type BN, SyncBN, GN, IN or BCN in the config, nor a class that '
            'has one by default. Expected the whole model config, such as '
            'cfg.model, after the import of the classes that it names. Where '
            'a class has it built in, add convert=True. For a network that is '
            'not built from a config, use '
            'wsbcn_mm.convert_to_micro_batch(module)'
        )
    if isinstance(pretrained, str) and not conversion.has_backbone:
        raise ValueError(
            f'micro_batch_model: pretrained={pretrained!r} is for the '
            f'backbone, but type={model_cfg["type"]!r} has none'
        )
    if isinstance(pretrained, str) and not may_exist(pretrained):
        _warn(
            f'there is no pretrained={pretrained!r}, so that training would '
            'fail'
        )
    if conversion.converts_once_built:
        result = conversion.converted(result)
    conversion.keep_function_of_checkpoint()
    return Replacement(
        {key: ConfigDict._hook(value) for key, value in result.items()}
    )


def is_converted(model_cfg: dict) -> bool:
    """Whether a model config is converted once built."""
    return class_name(model_cfg['type']) == 'ConvertedModel'


def unconverted(model_cfg: dict) -> dict:
    """The config of the model that is converted, or ``model_cfg``."""
    if not is_converted(model_cfg):
        return model_cfg
    model_cfg = dict(model_cfg)
    conversion = model_cfg.pop('conversion')
    return {**model_cfg, 'type': conversion['model_type']}


class Replacement(ConfigDict):
    """A config that replaces its base's instead of being merged into it.

    When ``model`` of a config file meets that of its base, mmengine merges
    them, and what the new one lacks (BN's ``eps``, a checkpoint) comes back,
    unless ``pop('_delete_', False)`` is true. Here it is, without a key that
    other readers of the dict would stumble over. What mmengine puts into the
    merged config is a plain ConfigDict.
    """

    def pop(self, key, default=None):
        return key == '_delete_' or super().pop(key, default)

    @property
    def scope(self) -> Optional[str]:
        """What mmengine writes into ``_scope_`` of a base's variable."""
        return self.get('_scope_')


class _Conversion:
    """One walk through a model config, from the root down."""

    def __init__(
        self,
        norm_cfg: dict,
        conv_cfg: dict,
        pretrained: Union[bool, str, None],
        convert: Optional[bool],
    ):
        self.norm_cfg = norm_cfg
        self.conv_cfg = conv_cfg
        self.pretrained = pretrained
        self.converts_once_built = convert
        self.norms = []  # all that were inserted
        self.failure: Optional[Exception] = None  # of building the model
        # By path, as 'roi_head.mask_head': the components whose conv_cfg
        # standardizes now, and what they had.
        self.standardized: Dict[str, Tuple[dict, dict]] = {}
        self.standardized_once_built: Set[str] = set()  # names of layers
        self.left = []  # batch normalizations that nothing converts
        self.has_backbone = False
        self.from_group_norm = False  # whether a checkpoint holds GN's affine

    def convert(self, cfg: dict, scope: Optional[str]) -> dict:
        """Convert the config of a model, in place."""
        cfg = self._convert(cfg, scope, '')
        self._try_out(cfg, scope)
        self._fit_checkpoints(cfg, scope, '')
        return cfg

    def _convert(self, cfg: Any, scope: Optional[str], path: str) -> Any:
        if isinstance(cfg, (list, tuple)):
            return type(cfg)(
                self._convert(c, scope, _join(path, i))
                for i, c in enumerate(cfg)
            )
        if not isinstance(cfg, dict):
            return cfg
        if _is_replaced(cfg):
            return self._norm()
        scope = cfg.get('_scope_') or scope
        component = registered(cfg.get('type'), scope)
        if family(component) & HANDED_DOWN:
            return cfg
        if family(component) & NORMALIZED_HEADS:
            self._normalize_heads(cfg)
        if isinstance(cfg.get('backbone'), dict):
            self._start_backbone(cfg)
        norms = {k: v for k, v in cfg.items() if _is_replaced(v)}
        for name, part in cfg.items():
            if name not in OTHER_PARTS and name not in norms:
                cfg[name] = self._convert_part(
                    component, name, part, scope, _join(path, name)
                )
        parameters = constructor_parameters(component)
        norms.update(
            (name, default)
            for name, default in parameters.items()
            if name not in cfg and _is_replaced(default)
        )
        if norms and self._sees_feature_maps(cfg, component):
            self._replace(cfg, component, parameters, norms, path)
        return cfg

    def _try_out(self, cfg: dict, scope: Optional[str]) -> None:
        """Find out from the built model what the config does not reach.

        Classes may build normalizations of their own, pass ``conv_cfg`` by,
        or use it where no normalization follows.
        """
        changed = self._look(cfg, scope, '')
        owners = {self._owner(cfg, entry.name) for entry in changed}
        owners = ' and '.join(sorted(owners))
        undecided = self.converts_once_built is None
        if self.failure and self.converts_once_built is not True:
            if not self.norms and registered(cfg['type'], scope) is None:
                return  # nothing speaks for it
            self.converts_once_built = undecided
            why = str(self.failure).strip('\'"').partition('. ')[0][:100]
            _tell(
                'the model cannot be built yet '
                f'({type(self.failure).__name__}: {why}): what its config '
                'does not reach is '
                + (
                    'converted once it is built'
                    if undecided
                    else 'not known, and convert=False leaves it'
                )
            )
        elif owners and undecided:
            self.converts_once_built = True
            _tell(
                f'no config reaches some layers of {owners}: they are '
                'converted once the model is built'
            )
        elif owners and not self.converts_once_built:
            _warn(
                f'no config reaches some layers of {owners}, and '
                'convert=False leaves them. Later only the built model can be '
                'converted, by wsbcn_mm.convert_to_micro_batch(model)'
            )
        elif self.left:  # else the built model tells it
            _tell(
                f'{len(self.left)} batch normalizations stay, the first '
                f'{self.left[0].name}: {self.left[0].reason}'
            )
        if self.converts_once_built:
            self.standardized_once_built = {
                entry.name for entry in changed if entry.kind == 'convolution'
            }

    def _look(self, cfg: Any, scope: Optional[str], path: str) -> list:
        """Build a part of the model, and where that fails what it is made of.

        Returns:
            list[Entry]: The layers that conversion once built would change.
        """
        from ..converted_model import try_conversion  # it imports this module

        if isinstance(cfg, (list, tuple)):
            parts = enumerate(cfg)
        elif isinstance(cfg, dict) and not _is_replaced(cfg):
            scope = cfg.get('_scope_') or scope
            parts = ((k, v) for k, v in cfg.items() if k not in OTHER_PARTS)
        else:
            return []
        if not path or (
            isinstance(cfg, dict) and registered(cfg.get('type'), scope)
        ):
            try:
                report = try_conversion(
                    cfg, scope, self.norm_cfg, self.conv_cfg
                )
            except Exception as error:
                inside = [p for p in self.standardized if _is_in(p, path)]
                if inside and PLAIN_CONVOLUTION in str(error):
                    self._take_back(inside)
                    return self._look(cfg, scope, path)
                self.failure = self.failure or error
            else:
                misplaced = [_join(path, e.name) for e in report.misplaced]
                if self._take_back(self._holders(misplaced, path)):
                    return self._look(cfg, scope, path)
                changed, left = (
                    [replace(e, name=_join(path, e.name)) for e in entries]
                    for entries in (report.changed, report.left)
                )
                self.left += [e for e in left if e.kind == 'batch norm']
                return changed
        return [
            entry
            for name, part in parts
            for entry in self._look(part, scope, _join(path, name))
        ]

    def _holders(self, names: Iterable[str], path: str) -> Set[str]:
        """Return the components whose ``conv_cfg`` layers have.

        A layer that is at another place than its config stands for all of
        the part at ``path``.
        """
        found = set()
        for name in names:
            holders = [p for p in self.standardized if _is_in(name, p)]
            found.update(
                [max(holders, key=len)]
                if holders
                else [p for p in self.standardized if _is_in(p, path)]
            )
        return found

    def _take_back(self, paths: Iterable[str]) -> bool:
        """Give components the ``conv_cfg`` back that they had."""
        for path in paths:
            cfg, before = self.standardized.pop(path)
            del cfg['conv_cfg']
            cfg.update(before)
        return bool(paths)

    @staticmethod
    def _owner(cfg: dict, name: str) -> str:
        """Return the class of the innermost component around a layer."""
        owner = cfg['type']
        for part in name.split('.'):
            if isinstance(cfg, (list, tuple)) and part.isdigit():
                cfg = cfg[int(part)]
            else:
                cfg = cfg.get(part)
            if not isinstance(cfg, (dict, list, tuple)):
                break
            if isinstance(cfg, dict) and 'type' in cfg:
                owner = cfg['type']
        return class_name(owner)

    def converted(self, cfg: dict) -> dict:
        """The config of a model that is converted once built."""
        conversion = dict(
            model_type=cfg['type'],
            norm_cfg=self._norm(),
            conv_cfg=self.conv_cfg,
        )
        if self.pretrained is not None:
            conversion['pretrained'] = self.pretrained
        return {**cfg, 'type': 'ConvertedModel', 'conversion': conversion}

    def keep_function_of_checkpoint(self) -> None:
        """A GN checkpoint has an affine for every channel: so must BCN."""
        if self.from_group_norm and issubclass(norm_class(self.norm_cfg), BCN):
            for norm in self.norms:
                norm.setdefault('channel_affine', 'channel')

    def _convert_part(
        self, component, name: str, part: Any, scope, path: str
    ) -> Any:
        for owner in family(component):
            implied = IMPLIED_TYPES.get((owner, name))
            if implied and isinstance(part, dict) and 'type' not in part:
                part = self._convert(dict(part, type=implied), scope, path)
                del part['type']
                return part
        return self._convert(part, scope, path)

    def _normalize_heads(self, cfg: dict) -> None:
        """Give a detector the form that it has in the zoo's gn+ws folder."""
        necks = cfg.get('neck')
        for neck in necks if isinstance(necks, list) else [necks]:
            if neck and class_name(neck.get('type')) == 'FPN':
                neck['norm_cfg'] = self.norm_cfg
        roi_head = cfg.get('roi_head') or {}
        for name, old, new in (
            ('bbox_head', 'Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead'),
            ('mask_head', 'FCNMaskHead', 'FCNMaskHead'),
        ):
            head = roi_head.get(name)
            if isinstance(head, dict) and class_name(head.get('type')) == old:
                if new != old:
                    _tell(
                        f'{new} takes the place of {old}, as in the paper. To '
                        f'keep that: model.roi_head.{name} = '
                        f'_base_.model.roi_head.{name}, after the call'
                    )
                scope = head['type'][: -len(old)]  # as 'mmdet.', or none
                head.update(type=scope + new, norm_cfg=self.norm_cfg)
                head.setdefault('conv_out_channels', 256)

    @staticmethod
    def _sees_feature_maps(cfg: dict, component) -> bool:
        if not family(component) & VECTOR_NORMALIZATIONS:
            return True
        _warn(
            f'{class_name(cfg["type"])} normalizes vectors rather than '
            'feature maps and keeps its normalization'
        )
        return False

    def _replace(
        self, cfg: dict, component, parameters: dict, norms: dict, path: str
    ) -> None:
        """Replace the ``norms`` of a component, and what goes with them."""
        for name in norms:
            cfg[name] = self._norm()
            if norm_class(self.norm_cfg) is nn.GroupNorm:
                for owner in family(component) & NARROWEST.keys():
                    width = NARROWEST[owner]
                    cfg[name]['num_groups'] = math.gcd(
                        cfg[name]['num_groups'],
                        cfg.get(width, parameters[width]),
                    )
        if component is None and 'type' in cfg:
            _warn(
                f'{class_name(cfg["type"])} is not registered, so that only '
                'the normalizations that the config names are replaced now, '
                'and the convolutions once the model is built. Import the '
                'module that registers it first'
            )
        if 'conv_cfg' in parameters:
            old = cfg.get('conv_cfg', parameters['conv_cfg'])
            new = self._convolution(cfg, parameters)
            if new is not old:
                if not _is_plain(new) and _is_plain(old):
                    before = {k: v for k, v in cfg.items() if k == 'conv_cfg'}
                    self.standardized[path] = (cfg, before)
                cfg['conv_cfg'] = new
        if 'norm_eval' in parameters:
            cfg['norm_eval'] = False
        if 'frozen_stages' in cfg and 'frozen_stages' in parameters:
            cfg['frozen_stages'] = parameters['frozen_stages']  # none

    def _norm(self) -> dict:
        self.norms.append(copy.deepcopy(self.norm_cfg))
        return self.norms[-1]

    def _convolution(self, cfg: dict, parameters: dict) -> Optional[dict]:
        """The ``conv_cfg`` where a normalization follows."""
        old = cfg.get('conv_cfg', parameters['conv_cfg'])
        kind = re.fullmatch(
            r'(?:Conv|ConvWS|ConvWN|ConvCWN|CenConv)(?:([123])d)?',
            'Conv2d' if old is None else class_name(old['type']),
        )
        if (
            not kind
            or cfg.get('dcn')  # a backbone takes one of the two
            or cfg.get(
                'no_norm_on_lateral', parameters.get('no_norm_on_lateral')
            )
        ):
            return old
        if _is_plain(self.conv_cfg) and _is_plain(old):
            return old
        new = copy.deepcopy(self.conv_cfg)
        if kind[1] in ('1', '3'):
            new['type'] = re.sub(r'2d$', '', new['type']) + f'{kind[1]}d'
        return new if registered(new['type']) else old

    def _start_backbone(self, cfg: dict) -> None:
        """Let the backbone of ``cfg`` start from the given checkpoint."""
        self.has_backbone = True
        if not isinstance(self.pretrained, str):
            return
        for owner in (cfg, cfg['backbone']):
            owner.pop('pretrained', None)
        cfg['backbone']['init_cfg'] = dict(
            type='Pretrained', checkpoint=self.pretrained
        )

    def _fit_checkpoints(
        self, cfg: Any, scope: Optional[str], path: str
    ) -> None:
        """Keep, replace or remove the checkpoints that a config names."""
        if isinstance(cfg, (list, tuple)):
            for i, part in enumerate(cfg):
                self._fit_checkpoints(part, scope, _join(path, i))
        if not isinstance(cfg, dict):
            return
        scope = cfg.get('_scope_') or scope
        for name, part in cfg.items():
            if name not in OTHER_PARTS:
                self._fit_checkpoints(part, scope, _join(path, name))
        standardized = any(
            _is_in(name, path)
            for name in (*self.standardized, *self.standardized_once_built)
        )
        kind = class_name(cfg.get('backbone', cfg).get('type'))
        lost = False
        for holder, key in checkpoints(cfg):
            old = holder[key]
            holder[key] = new = self._checkpoint(old, kind, standardized)
            lost |= new in (None, False)
            self.from_group_norm |= isinstance(new, str) and bool(
                _GROUP_NORM_NAME.search(new)
            )
        if lost:
            self._start_from_scratch(cfg, scope)

    def _checkpoint(
        self, old: Union[str, bool], kind: str, standardized: bool
    ) -> Union[str, bool, None]:
        """What takes the place of a checkpoint; None or False: nothing.

        True stands for one that a class knows itself, as those of timm.
        """
        nothing = False if old is True else None
        if self.pretrained is False:
            return nothing
        if not standardized or self.pretrained in (True, old):
            return old
        new = nothing
        if class_name(self.conv_cfg['type']) == 'ConvWS' and issubclass(
            norm_class(self.norm_cfg), (nn.GroupNorm, BCN)
        ):
            new = GN_WS_CHECKPOINTS.get(old, nothing)
        _warn(
            f'{kind} starts '
            + (f'from {new!r} instead of' if new else 'from scratch, not from')
            + (' weights of its own' if old is True else f' {old!r}')
            + ', since Weight Standardization would change what these '
            'weights compute. To choose: pretrained=True (these all '
            'the same), False (from scratch), or the name of a checkpoint'
        )
        return new

    @staticmethod
    def _start_from_scratch(cfg: dict, scope: Optional[str]) -> None:
        inits = cfg.pop('init_cfg', None) or []
        inits = inits if isinstance(inits, (list, tuple)) else [inits]
        inits = [i for i in inits if i.get('checkpoint', '') is not None]
        if inits:
            cfg['init_cfg'] = inits
        backbone = cfg.get('backbone', cfg)
        component = registered(backbone.get('type'), scope)
        if 'zero_init_residual' in constructor_parameters(component):
            backbone.setdefault('zero_init_residual', False)


# A checkpoint whose name says that its normalization is a GN, as in the zoo.
_GROUP_NORM_NAME = re.compile(r'(?:^|[^a-z0-9])gn(?:[^a-z0-9]|$)')


def checkpoints(cfg: dict):
    """Yield where a config itself names checkpoints.

    Yields:
        tuple[dict, str]: A dict, and the key of the checkpoint in it. Its
        value is True where the class knows which, as those of timm.
    """
    if isinstance(cfg.get('pretrained'), str) or cfg.get('pretrained') is True:
        yield cfg, 'pretrained'
    inits = cfg.get('init_cfg')
    for init in inits if isinstance(inits, (list, tuple)) else [inits]:
        if isinstance(init, dict) and isinstance(init.get('checkpoint'), str):
            yield init, 'checkpoint'


def _check_config(name: str, cfg: dict, example: str) -> None:
    if not isinstance(cfg, dict):
        raise TypeError(
            f'micro_batch_model: {name} must be a dict such as {example}; '
            f'got {_short(cfg)} ({type(cfg).__name__})'
        )
    if 'type' not in cfg:
        raise ValueError(
            f"micro_batch_model: {name} must have a 'type', such as "
            f'{example}; got the keys {sorted(cfg)}'
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f'{text[:76]} ...'


def _scope(model_cfg: dict) -> Optional[str]:
    """The library whose registry knows the model's type."""
    current = DefaultScope.get_current_instance()
    prefix = str(model_cfg['type']).partition('.')[0]
    for scope in (
        prefix if prefix in LIBRARIES else None,
        model_cfg.get('_scope_'),
        current and current.scope_name,
        *LIBRARIES,
    ):
        if scope and registered(model_cfg['type'], scope):
            return scope
    return None


def _join(path: str, key: Union[str, int]) -> str:
    return f'{path}.{key}' if path else str(key)


def _is_in(name: str, path: str) -> bool:
    """Whether a layer or a component is part of the one at ``path``."""
    return not path or f'{name}.'.startswith(f'{path}.')


def _is_replaced(cfg: Any) -> bool:
    """Whether ``cfg`` is a normalization that depends on batch or groups.

    A GN of one group is a layer normalization by another name.
    """
    kind = norm_class(cfg)
    return kind is not None and not (
        kind is nn.GroupNorm and cfg.get('num_groups') == 1
    )


def _is_plain(conv_cfg: Optional[dict]) -> bool:
    """Whether ``conv_cfg`` means torch's own convolution."""
    return conv_cfg is None or bool(
        re.fullmatch(r'Conv([123]d)?', class_name(conv_cfg['type']))
    )


def may_exist(checkpoint: str) -> bool:
    """Whether a checkpoint is there, or would have to be fetched to know."""
    return '://' in checkpoint or osp.isfile(osp.expanduser(checkpoint))


@functools.lru_cache(maxsize=None)  # once, however many configs are read
def _tell(message: str) -> None:
    print_log(f'micro_batch_model: {message}.', logger='current')


def _warn(message: str) -> None:
    """Warn of the line that calls this module, most likely of a config."""
    frame, level = inspect.currentframe(), 1
    while frame.f_globals.get('__name__') == __name__:
        frame, level = frame.f_back, level + 1
    warnings.warn(f'micro_batch_model: {message}.', stacklevel=level)
