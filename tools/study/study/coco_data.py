"""Point a config of MMDetection at a data set in COCO's format."""

import json
import os.path as osp
from typing import Any, List

from mmengine.config import Config

from wsbcn_mm.engine.command_line import UsageError

SPLITS = dict(train=('train',), val=('val', 'test'))


def use_coco(cfg: Config, train: List[str], val: List[str]) -> None:
    """Let a config train and test on other data than it was written for.

    Images, annotations, class names and the number of classes in the model
    are set; the rest stays.

    Args:
        cfg (Config): A config of MMDetection, changed in place.
        train (list[str]): An annotation file and the folder of its images.
        val (list[str]): The same for the images to test on.

    Raises:
        UsageError: If the config is of another library, or the data set is
            not complete.
    """
    if cfg.get('default_scope') != 'mmdet':
        raise UsageError(
            'the options --train and --val are for configs of MMDetection; '
            'in others set the data set, or give --cfg-options.'
        )
    masks = _loads_masks(cfg)
    classes = _classes(*train, masks)
    if _classes(*val, masks) != classes:
        raise UsageError(
            f'{train[0]} and {val[0]} do not have the same categories in '
            'the same order.'
        )
    for split, (file, images) in (('train', train), ('val', val)):
        for name in SPLITS[split]:
            loader = cfg.get(f'{name}_dataloader')
            for dataset in _datasets(loader and loader.dataset):
                dataset.update(
                    type='CocoDataset',
                    data_root='',
                    ann_file=osp.abspath(file),
                    data_prefix=dict(img=osp.abspath(images) + osp.sep),
                    metainfo=dict(classes=classes),
                )
            evaluators = cfg.get(f'{name}_evaluator') or []
            if isinstance(evaluators, dict):
                evaluators = [evaluators]
            for evaluator in evaluators:
                if 'ann_file' in evaluator:
                    evaluator.ann_file = osp.abspath(file)
    _set_classes(cfg.model, len(classes))


def _classes(file: str, images: str, masks: bool) -> tuple:
    """Return the class names of an annotation file, having looked at it."""
    for path, what in ((file, 'annotation file'), (images, 'image folder')):
        if not osp.exists(path):
            raise UsageError(f'no {what} {path!r}.')
    try:
        with open(file, encoding='utf-8') as f:
            coco = json.load(f)
        names = [image['file_name'] for image in coco['images']]
        # In the order of CocoDataset's labels.
        classes = tuple(category['name'] for category in coco['categories'])
        annotations = coco['annotations']
    except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
        raise UsageError(
            f'{file} is no annotation file in the format of COCO '
            f'({type(error).__name__}: {error}).'
        ) from error
    missing = [n for n in names if not osp.isfile(osp.join(images, n))]
    if missing or not names:
        raise UsageError(
            f'{images} lacks {len(missing)} of the {len(names)} images of '
            f'{file}' + (f', such as {missing[0]}.' if missing else '.')
        )
    if not annotations:
        raise UsageError(f'{file} has no annotations.')
    if masks and not all(a.get('segmentation') for a in annotations):
        raise UsageError(
            f'{file} has annotations without a segmentation, and the config '
            'trains masks. Take one of Faster R-CNN, for instance.'
        )
    return classes


def _loads_masks(cfg: Config) -> bool:
    return any(
        step.get('with_mask')
        for dataset in _datasets(cfg.train_dataloader.dataset)
        for step in dataset.get('pipeline') or []
    )


def _datasets(cfg: Any) -> List[dict]:
    """Return the data sets inside of all wrappers."""
    if not cfg:
        return []
    inner = cfg.get('dataset') or cfg.get('datasets')
    if inner is None:
        return [cfg]
    inner = inner if isinstance(inner, (list, tuple)) else [inner]
    return sum(map(_datasets, inner), [])


def _set_classes(cfg: Any, count: int) -> None:
    if isinstance(cfg, (list, tuple)):
        for part in cfg:
            _set_classes(part, count)
    elif isinstance(cfg, dict):
        for name, part in cfg.items():
            if name == 'num_classes' and part != 1:  # an RPN's is 1
                cfg[name] = count
            else:
                _set_classes(part, count)
