"""What is wrong with the files of a config's data sets."""

import contextlib
import inspect
import json
import os.path as osp
import traceback
from typing import Any, Iterator, List, NamedTuple, Tuple

from mmengine.config import Config
from mmengine.registry import DATASETS

from .errors import UsageError

# The folders that every pipeline reads. Others, such as that of the ground
# truth, may be named and never looked at.
IMAGE_PREFIXES = ('img', 'img_path')


# What NumPy says to MMEngine, which joins the images that there are.
NO_IMAGES = 'need at least one array to concatenate'


class Missing(NamedTuple):
    """A path that is not there, and the setting that names it."""

    key: str
    what: str
    path: str
    owner: str


def missing_files(cfg: Config, *loaders: str) -> List[Missing]:
    """What the data sets of some loaders, and their evaluators, lack.

    What may be elsewhere (a URL, a storage backend, a data set that downloads
    itself) is not looked for.

    Args:
        cfg (Config): A whole config, whose library is the default scope.
        loaders (str): Such as ``'train_dataloader'``.

    Returns:
        list[Missing]: One for each setting, in the order of the loaders.
    """
    missing = []
    for loader in loaders:
        for key, dataset in _leaves(loader, cfg.get(loader)):
            missing += _of_dataset(key, dataset)
        evaluator = loader.replace('_dataloader', '_evaluator')
        for key, metric in _leaves(evaluator, cfg.get(evaluator)):
            missing += _of_metric(key, metric)
    return missing


@contextlib.contextmanager
def annotations_explained(dataset: dict):
    """Raise UsageError where an annotation file is why a data set fails.

    Args:
        dataset (dict): The config of the data set.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        reason = f'it is no JSON, or not all of it ({error})'
    except AssertionError as error:
        reason = str(error)
    except ValueError as error:
        if str(error) != NO_IMAGES:
            raise
        reason = (
            'no image is left to train on, since none has an annotation of '
            'one of the classes that metainfo=dict(classes=...) of the '
            'data set names'
        )
    except (KeyError, TypeError) as error:
        if not _in_annotations(error):
            raise
        reason = f'it lacks {error}, or something of another type is there'
    else:
        return
    told = [
        _annotation_file(part) + _categories(_annotation_file(part))
        for _, part in _leaves('', dataset)
    ]
    raise UsageError(
        f'{" or ".join(told) or "the training set"} cannot be used: {reason}. '
        'Expected what the data set of the config reads, such as the JSON of '
        'COCO. Make it again, or name another with --cfg-options '
        'train_dataloader.dataset.ann_file=...'
    )


def _annotation_file(dataset: dict) -> str:
    root = osp.expanduser(dataset.get('data_root') or '')
    return osp.join(root, str(dataset.get('ann_file') or ''))


def _names(path: str) -> List[str]:
    """The categories of an annotation file in the form of COCO, or none."""
    try:
        with open(path) as file:
            return [c['name'] for c in json.load(file)['categories']]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _categories(path: str) -> str:
    names = ', '.join(map(repr, _names(path)[:20]))
    return f' (its categories: {names})' if names else ''


def _in_annotations(error: Exception) -> bool:
    """Whether an error comes from reading annotations, not from a config."""
    frames = list(traceback.walk_tb(error.__traceback__))
    names = {frame.f_code.co_name for frame, _ in frames}
    return bool(
        names & {'load_data_list', 'parse_data_info', 'createIndex', 'COCO'}
    )


def problems_of_dataset(dataset: Any) -> Iterator[str]:
    """What makes a data set, once built, lose images or classes silently.

    Classes that the annotation file does not have also move the labels of
    those that come after them, in MMDetection.
    """
    parts = getattr(dataset, 'datasets', None) or [
        getattr(dataset, 'dataset', None)
    ]
    for part in parts:
        if part is not None:
            yield from problems_of_dataset(part)
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    found = getattr(dataset, 'cat_ids', None)
    if found is not None and len(found) < len(classes):
        names = set(classes).intersection(_names(dataset.ann_file))
        absent = [repr(name) for name in classes if name not in names]
        yield (
            f'{dataset.ann_file} has no {", ".join(absent)}, {len(absent)} of '
            f'the {len(classes)} classes of the config, so that MMDetection '
            'gives the others the labels before theirs'
            f'{_categories(dataset.ann_file)}. Write those to train on as '
            'metainfo=dict(classes=(...)) of each data set.'
        )


def _leaves(key: str, cfg: Any) -> Iterator[Tuple[str, dict]]:
    """The dicts inside of all wrappers, with their keys for --cfg-options."""
    if isinstance(cfg, (list, tuple)):
        for index, part in enumerate(cfg):
            yield from _leaves(f'{key}.{index}', part)
    elif isinstance(cfg, dict):
        for name in ('dataset', 'datasets', 'metrics'):
            if name in cfg:
                yield from _leaves(f'{key}.{name}', cfg[name])
                return
        yield key, cfg


def _of_dataset(key: str, dataset: dict) -> Iterator[Missing]:
    if 'type' not in dataset or _is_elsewhere(dataset):
        return
    owner = getattr(dataset['type'], '__name__', dataset['type'])
    root = osp.expanduser(dataset.get('data_root') or '')
    paths = [(f'{key}.ann_file', 'annotation file', dataset.get('ann_file'))]
    prefix = dataset.get('data_prefix')
    if isinstance(prefix, dict):
        for name in IMAGE_PREFIXES:
            paths.append(
                (f'{key}.data_prefix.{name}', 'image folder', prefix.get(name))
            )
    else:
        paths.append((f'{key}.data_prefix', 'image folder', prefix))
    paths = [
        (name, what, osp.expanduser(path))
        for name, what, path in paths
        if path and isinstance(path, str) and '://' not in path
    ]
    absolute = [path for path in paths if osp.isabs(path[2])]
    if root and not osp.exists(root):
        if not paths or len(absolute) < len(paths):  # else nobody needs it
            yield Missing(f'{key}.data_root', 'data set', root, owner)
        paths = absolute
    for name, what, path in paths:
        path = osp.join(root, path)
        if not osp.exists(path):
            yield Missing(name, what, path, owner)


def _is_elsewhere(dataset: dict) -> bool:
    """Whether a data set's files are not on this machine, or not yet."""
    if '://' in (dataset.get('data_root') or ''):
        return True
    steps = [s for s in dataset.get('pipeline') or [] if isinstance(s, dict)]
    if any(part.get('backend_args') for part in (dataset, *steps)):
        return True
    cls = dataset['type']
    if isinstance(cls, str):
        try:
            with DATASETS.switch_scope_and_registry(None) as registry:
                cls = registry.get(cls)
        except RuntimeError:  # nothing of this name: the runner will say so
            cls = None
    return (
        inspect.isclass(cls)
        and 'download' in inspect.signature(cls.__init__).parameters
        and dataset.get('download', True)
    )


def _of_metric(key: str, metric: dict) -> Iterator[Missing]:
    path = metric.get('ann_file')
    if (
        isinstance(path, str)
        and '://' not in path
        and not metric.get('backend_args')
        and not osp.exists(osp.expanduser(path))
    ):
        owner = getattr(metric.get('type'), '__name__', metric.get('type'))
        yield Missing(f'{key}.ann_file', 'annotation file', path, owner)
