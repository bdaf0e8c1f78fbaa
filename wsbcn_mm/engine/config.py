"""Any zoo config's model, made ready for one or two images per GPU."""

import copy
import functools
import inspect
import math
import os.path as osp
import re
import warnings
from typing import Any, Optional, Set, Union

from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import nn

from ..layers import BCN
from .components import (
    check_layer,
    class_name,
    constructor_parameters,
    family,
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

# Their conv_cfg also reaches convolutions that no normalization follows,
# which must keep their scale, or that have a single weight. Those that one
# follows are found once the model is built.
PLAIN_CONVOLUTIONS = {
    'mmpretrain.MobileOne',  # depthwise 1x1 branches
    'mmseg.CGNet',  # what its global gate sees
    'mmseg.DNLHead',  # queries, keys and values
    'mmseg.EMAHead',  # the input of the expectation maximization
    'mmseg.NLHead',  # queries, keys and values
}

# Their normalizations see vectors, (N, C), not feature maps.
VECTOR_NORMALIZATIONS = {
    'mmdet.LinearReIDHead',
    'mmpretrain.LeViTClsHead',
    'mmpretrain.LinearNeck',
    'mmpretrain.NonLinearNeck',
    'mmpretrain.StackedLinearClsHead',
    'mmpretrain.SwAVNeck',
}

# They build normalizations of their own, whatever norm_cfg says, so that they
# are complete only once the built model is converted.
FIXED_NORMALIZATIONS = {
    'mmdet.CTResNetNeck',
    'mmdet.CornerHead',
    'mmdet.DilatedEncoder',
    'mmdet.DoubleConvFCBBoxHead',
    'mmdet.DyHead',
    'mmdet.GridHead',
    'mmdet.HourglassNet',
    'mmdet.NASFCOS_FPN',
    'mmpretrain.HRFuseScales',
    'mmpretrain.HRNet',
    'mmpretrain.InceptionV3',
    'mmpretrain.MobileViT',
    'mmpretrain.PyramidVig',
    'mmpretrain.RepLKNet',
    'mmpretrain.RepMLPNet',
    'mmpretrain.VAN',
    'mmpretrain.Vig',
    'mmseg.BiSeNetV1',
    'mmseg.BiSeNetV2',
    'mmseg.DDRNet',
    'mmseg.ERFNet',
    'mmseg.PIDNet',
    'mmseg.STDCContextPathNet',
}

# The same of convolutions that norm_cfg normalizes and conv_cfg passes by.
FIXED_CONVOLUTIONS = {
    'mmdet.CSPNeXt',
    'mmdet.CSPNeXtPAFPN',
    'mmdet.FPG',
    'mmdet.MSDeformAttnPixelDecoder',
    'mmdet.NASFCOSHead',
    'mmdet.NASFPN',
    'mmdet.PixelDecoder',
    'mmdet.RTMDetInsSepBNHead',
    'mmdet.ResLayer',
    'mmdet.ResNeSt',
    'mmdet.SOLOHead',
    'mmdet.SOLOV2Head',
    'mmdet.TransformerEncoderPixelDecoder',
    'mmdet.YOLOFHead',
    'mmpretrain.CSPResNet',
    'mmpretrain.DenseNet',
    'mmpretrain.EfficientNetV2',
    'mmpretrain.ResNeSt',
    'mmseg.DDRHead',
    'mmseg.DepthwiseSeparableASPPHead',
    'mmseg.DepthwiseSeparableFCNHead',
    'mmseg.FastSCNN',
    'mmseg.JPU',
    'mmseg.LRASPPHead',
    'mmseg.PIDHead',
    'mmseg.ResNeSt',
    'mmseg.STDCNet',
    'mmseg.SegformerHead',
    'mmseg.UNet',
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
            None, where a class is known for it, as the head of DeepLabV3+

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
    if norm_class(norm_cfg) is None:
        raise ValueError(
            'micro_batch_model: norm_cfg must name a normalization of feature '
            f"maps, such as 'BCN' or 'GN'; got type={norm_cfg['type']!r}"
        )
    if conv_cfg is None:
        conv_cfg = dict(type='ConvWS')
    _check_config('conv_cfg', conv_cfg, "dict(type='ConvWS')")
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
    if is_converted(model_cfg) and convert is None:
        convert = True
    result = unconverted(plain_copy(model_cfg))
    scope = _scope(result)
    fixed = ' and '.join(sorted(_fixed(result, scope, conv_cfg)))
    if fixed and convert is None:
        _tell(
            f'no config reaches some layers of {fixed}: they are converted '
            'once the model is built'
        )
        convert = True
    elif fixed and not convert:
        _warn(
            f'no config reaches some layers of {fixed}, and convert=False '
            'leaves them. Later only the built model can be converted, by '
            'wsbcn_mm.convert_to_micro_batch(model)'
        )
    conversion = _Conversion(
        norm_cfg, dict(conv_cfg), pretrained, bool(convert)
    )
    result = conversion.convert(result, scope)
    if not conversion.norms and not convert:
        raise ValueError(
            f'micro_batch_model: found no normalization to replace in '
            f'type={model_cfg["type"]!r}: neither a norm_cfg of type BN, '
            'SyncBN, GN, IN or BCN in the config, nor a class that has one by '
            'default. Expected the whole model config, such as cfg.model. '
            'Where a class has it built in, add convert=True. For a network '
            'that is not built from a config, use '
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
    if convert:
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
        built: bool,
    ):
        self.norm_cfg = norm_cfg
        self.conv_cfg = conv_cfg
        self.pretrained = pretrained
        self.built = built  # whether the built model is converted as well
        self.norms = []  # all that were inserted
        self.standardized = 0  # components that were not standardized before
        self.has_backbone = False
        self.from_group_norm = False  # whether a checkpoint holds GN's affine

    def convert(self, cfg: Any, scope: Optional[str]) -> Any:
        """Convert ``cfg`` and what it contains, in place."""
        if isinstance(cfg, (list, tuple)):
            return type(cfg)(self.convert(c, scope) for c in cfg)
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
        standardized = self.standardized
        norms = {k: v for k, v in cfg.items() if _is_replaced(v)}
        for name, part in cfg.items():
            if name not in OTHER_PARTS and name not in norms:
                cfg[name] = self._convert_part(component, name, part, scope)
        parameters = constructor_parameters(component)
        norms.update(
            (name, default)
            for name, default in parameters.items()
            if name not in cfg and _is_replaced(default)
        )
        if norms and self._sees_feature_maps(cfg, component):
            self._replace(cfg, component, parameters, norms)
        if self._standardizes_once_built(component, parameters, norms):
            self.standardized += 1
        self._fit_checkpoints(cfg, scope, self.standardized > standardized)
        return cfg

    def converted(self, cfg: dict) -> dict:
        """The config of a model that is converted once built."""
        conversion = dict(
            model_type=cfg['type'],
            norm_cfg=self._norm(),
            conv_cfg=self.conv_cfg,
        )
        return {**cfg, 'type': 'ConvertedModel', 'conversion': conversion}

    def keep_function_of_checkpoint(self) -> None:
        """A GN checkpoint has an affine for every channel: so must BCN."""
        if self.from_group_norm and issubclass(norm_class(self.norm_cfg), BCN):
            for norm in self.norms:
                norm.setdefault('channel_affine', 'channel')

    def _convert_part(self, component, name: str, part: Any, scope) -> Any:
        for owner in family(component):
            implied = IMPLIED_TYPES.get((owner, name))
            if implied and isinstance(part, dict) and 'type' not in part:
                part = self.convert(dict(part, type=implied), scope)
                del part['type']
                return part
        return self.convert(part, scope)

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
                head.update(type=new, norm_cfg=self.norm_cfg)
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
        self, cfg: dict, component, parameters: dict, norms: dict
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
                'the normalizations that the config names are replaced and '
                'the convolutions stay. Import the module that registers it '
                'first'
            )
        if 'conv_cfg' in parameters:
            old = cfg.get('conv_cfg', parameters['conv_cfg'])
            new = self._convolution(cfg, component, parameters)
            if new is not old:
                cfg['conv_cfg'] = new
                self.standardized += not _is_plain(new) and _is_plain(old)
        if 'norm_eval' in parameters:
            cfg['norm_eval'] = False
        if 'frozen_stages' in cfg and 'frozen_stages' in parameters:
            cfg['frozen_stages'] = parameters['frozen_stages']  # none

    def _standardizes_once_built(
        self, component, parameters: dict, norms: dict
    ) -> bool:
        """Whether convolutions change that ``conv_cfg`` does not reach."""
        if not self.built or _is_plain(self.conv_cfg):
            return False
        return _is_fixed(component, self.conv_cfg) or (
            bool(norms) and 'conv_cfg' not in parameters
        )

    def _norm(self) -> dict:
        self.norms.append(copy.deepcopy(self.norm_cfg))
        return self.norms[-1]

    def _convolution(
        self, cfg: dict, component, parameters: dict
    ) -> Optional[dict]:
        """The ``conv_cfg`` where a normalization follows."""
        old = cfg.get('conv_cfg', parameters['conv_cfg'])
        kind = re.fullmatch(
            r'(?:Conv|ConvWS|ConvWN|ConvCWN|CenConv)(?:([123])d)?',
            'Conv2d' if old is None else class_name(old['type']),
        )
        if (
            not kind
            or family(component) & PLAIN_CONVOLUTIONS
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
        self, cfg: dict, scope: Optional[str], standardized: bool
    ) -> None:
        """Keep, replace or remove the checkpoints that ``cfg`` names."""
        kind = class_name(cfg.get('backbone', cfg).get('type'))
        lost = False
        for holder, key in _checkpoints(cfg):
            old = holder[key]
            holder[key] = new = self._checkpoint(old, kind, standardized)
            lost |= new is None
            self.from_group_norm |= bool(_GROUP_NORM_NAME.search(new or ''))
        if lost:
            self._start_from_scratch(cfg, scope)

    def _checkpoint(
        self, old: str, kind: str, standardized: bool
    ) -> Optional[str]:
        """What takes the place of a checkpoint; None: nothing."""
        if self.pretrained is False:
            return None
        if not standardized or self.pretrained in (True, old):
            return old
        new = None
        if class_name(self.conv_cfg['type']) == 'ConvWS' and issubclass(
            norm_class(self.norm_cfg), (nn.GroupNorm, BCN)
        ):
            new = GN_WS_CHECKPOINTS.get(old)
        _warn(
            f'{kind} starts '
            + (f'from {new!r} instead of' if new else 'from scratch, not from')
            + f' {old!r}, since Weight Standardization would change what '
            'these weights compute. To choose: pretrained=True (these all '
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


def _checkpoints(cfg: dict):
    """Where ``cfg`` itself names checkpoints."""
    if isinstance(cfg.get('pretrained'), str):
        yield cfg, 'pretrained'
    inits = cfg.get('init_cfg')
    for init in inits if isinstance(inits, (list, tuple)) else [inits]:
        if isinstance(init, dict) and isinstance(init.get('checkpoint'), str):
            yield init, 'checkpoint'


def _check_config(name: str, cfg: dict, example: str) -> None:
    if not isinstance(cfg, dict):
        raise TypeError(
            f'micro_batch_model: {name} must be a dict such as {example}; '
            f'got {cfg!r} ({type(cfg).__name__})'
        )
    if 'type' not in cfg:
        raise ValueError(
            f"micro_batch_model: {name} must have a 'type', such as "
            f'{example}; got the keys {sorted(cfg)}'
        )


def _scope(model_cfg: dict) -> Optional[str]:
    """The library whose registry knows the model's type."""
    current = DefaultScope.get_current_instance()
    for scope in (
        model_cfg.get('_scope_'),
        current and current.scope_name,
        *LIBRARIES,
    ):
        if scope and registered(model_cfg['type'], scope):
            return scope
    return None


def _is_fixed(component: Optional[type], conv_cfg: dict) -> bool:
    """Whether a class has layers that only conversion once built changes."""
    fixed = FIXED_NORMALIZATIONS
    if not _is_plain(conv_cfg):
        fixed = fixed | FIXED_CONVOLUTIONS | PLAIN_CONVOLUTIONS
    return bool(family(component) & fixed)


def _fixed(cfg: Any, scope: Optional[str], conv_cfg: dict) -> Set[str]:
    """The classes in ``cfg`` that :func:`_is_fixed` says it of."""
    if isinstance(cfg, (list, tuple)):
        return set().union(*(_fixed(part, scope, conv_cfg) for part in cfg))
    if not isinstance(cfg, dict):
        return set()
    scope = cfg.get('_scope_') or scope
    component = registered(cfg.get('type'), scope)
    is_fixed = _is_fixed(component, conv_cfg)
    return ({class_name(component)} if is_fixed else set()).union(
        *(
            _fixed(part, scope, conv_cfg)
            for name, part in cfg.items()
            if name not in OTHER_PARTS
        )
    )


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
