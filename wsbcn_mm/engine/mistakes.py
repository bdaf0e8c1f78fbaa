"""Mistakes in configs and in what they name, told in a line or few."""

import contextlib
import difflib
import errno
import importlib
import inspect
import os
import os.path as osp
import re
import traceback
from importlib.util import find_spec
from typing import Any, Iterable, Iterator, List, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import Registry, init_default_scope, root

from .components import constructor_parameters
from .config import micro_batch_model
from .errors import UsageError

# default_scope of a config: what to install
LIBRARIES = {
    'mmdet': 'mmdet',
    'mmseg': 'mmsegmentation',
    'mmpretrain': 'mmpretrain',
}


def config_from_file(path: str) -> Config:
    """Read a config; raise UsageError where it is wrong in a known way."""
    try:
        return Config.fromfile(path)
    except Exception as error:
        mistake = _mistake_in_config(path, error)
        if mistake is None:
            raise
        raise UsageError(mistake) from error


def import_library(cfg: Config) -> None:
    scope = cfg.get('default_scope', 'mmengine')
    if scope in LIBRARIES:
        try:
            importlib.import_module(scope)
        except ModuleNotFoundError as error:
            if error.name != scope:
                raise
            raise UsageError(
                f'the config is for {scope}, which is not installed: pip '
                f'install {LIBRARIES[scope]}, or bash tools/setup_env.sh '
                'for all of it.'
            ) from None
    elif find_spec(scope) is None:
        raise UsageError(
            f'no library {scope!r}, the default_scope of the config.'
            + did_you_mean(scope, LIBRARIES)
        )
    init_default_scope(scope)


def _mistake_in_config(path: str, error: Exception) -> Optional[str]:
    """What an exception of reading a config means; None: who knows."""
    text = str(error)
    if isinstance(error, ImportError):
        return f'{path} needs a package: {error}'
    if isinstance(error, SyntaxError):
        line = (error.text or '').strip()
        if osp.isfile(error.filename or ''):
            where = error.filename
        else:  # mmengine does not tell, and it may be a base's
            with open(path, encoding='utf-8') as file:
                where = path if line in file.read() else f'a base of {path}'
        return f'{where}, line {error.lineno}: {error.msg}: {line}'
    if isinstance(error, (NameError, RuntimeError)) and (
        '_base_' in text or 'inheritance chain' in text
    ):  # mmengine takes it for its newer style, which has no _base_
        base = re.search(r'module in (\S+)\. ', text)
        return (
            f"{base[1] if base else path}: _base_ = '...' must be the first "
            'line. Imports, such as that of micro_batch_model, come after it.'
        )
    if isinstance(error, FileNotFoundError):
        return f'{path}: {error}'
    if isinstance(error, (TypeError, ValueError)) and text.startswith(
        'micro_batch_model'
    ):
        argument = re.search(r"unexpected keyword argument '(\w+)'", text)
        if argument:
            known = inspect.signature(micro_batch_model).parameters
            text += '.' + did_you_mean(argument[1], known)
        return text
    if isinstance(error, TypeError) and 'cannot inherit from base' in text:
        return f'{path}: {text}'  # which says what to do
    return None


@contextlib.contextmanager
def mistakes_explained(cfg: Config):
    """Raise UsageError where a config is why something cannot be built.

    Errors from elsewhere keep their traceback, and so does everything where
    the environment variable ``WSBCN_MM_TRACEBACK`` is set.
    """
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        built = _being_built(error)
        if built is None or os.environ.get('WSBCN_MM_TRACEBACK'):
            raise
        text = str(error.args[0] if error.args else error).splitlines()[0]
        lines = list(_mistakes(cfg, text)) or [
            ' > '.join([*built, text]).rstrip('.')
            + '. Set WSBCN_MM_TRACEBACK=1 to see where.'
        ]
        raise UsageError('the config: ' + '\n'.join(lines)) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with what is spelled alike, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f' Did you mean {" or ".join(map(repr, close))}?' if close else ''


def about_a_file(error: Exception) -> Optional[str]:
    """What an error says of a file; None if it is of something else."""
    text = str(error)
    if 'in DataLoader worker' in text:  # by torch, which keeps the type alone
        text = text.strip().splitlines()[-1].partition(': ')[2]
    image = re.search(r'failed to load image: (.*)', text)
    if isinstance(error, AssertionError) and image:
        return f'{image[1]!r} is no image that can be read. {_GO_ON}'
    if type(error).__module__ == 'cv2':  # of an empty file, without its name
        return (
            f'{_image_being_read(error)} is empty or damaged: '
            f'{text.strip().splitlines()[-1]} {_GO_ON}'
        )
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f' for {error.filename!r}' if error.filename else ''
        return (
            f'no space{where}: {error.strerror}. What was saved before is '
            'whole. Free some space and run the same again; tools/train.py '
            'goes on with --resume.'
        )
    missing = re.search(r"No such file or directory: '(.*)'", text)
    if missing:
        return f'no file {missing[1]!r}. {_GO_ON}'
    if error.filename:
        return f'{error.filename!r}: {error.strerror}.'
    return None


def _image_being_read(error: Exception) -> str:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get('__name__') == 'mmcv.transforms.loading':
            return repr(frame.f_locals.get('filename'))
    return 'an image (train_dataloader.num_workers=0 tells which)'


_GO_ON = (
    'Put it there, or take it out of what names it, such as the annotation '
    'file; tools/train.py goes on with --resume.'
)


def _being_built(error: Exception) -> Optional[List[str]]:
    """The types that MMEngine was building; None if it built nothing."""
    types, builds = [], False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get('__name__', '')
        name = frame.f_code.co_name
        if module == 'mmengine.registry.build_functions':
            builds = True
            kind = frame.f_locals.get('obj_type')
            types.append(getattr(kind, '__name__', kind))
        elif module.startswith('mmengine.runner'):
            builds |= name.startswith(('build_', 'register_', 'from_cfg'))
    return [t for t in types if isinstance(t, str)] if builds else None


def _mistakes(cfg: Any, text: str) -> Iterator[str]:
    """What in a config is mistaken, given that it could not be built."""
    keyword = re.search(r"unexpected keyword argument '(\w+)'", text)
    # Some builders tell no name: "Cannot find None in registry".
    unknown = re.search(r'(\S+) is not in the .* registry|None', text)
    for path, part in _dicts(cfg):
        for key, value in part.items():
            if key.endswith('_cfg') and isinstance(value, str):
                yield (
                    f'{path}.{key} must be a dict, such as '
                    f'dict(type={value!r}); got {value!r}'
                )
        kind = part.get('type')
        cls, names = _component(kind) if isinstance(kind, str) else (kind, [])
        if isinstance(kind, str) and cls is None:
            if unknown is None or unknown[1] not in (None, kind):
                continue
            yield (
                f'{path} is of no known type {kind!r}.'
                + did_you_mean(kind.rpartition('.')[2], names)
            )
        elif keyword and keyword[1] in part:
            taken = constructor_parameters(cls) if inspect.isclass(cls) else ()
            known = {'type', '_scope_', *taken}
            extra = [repr(key) for key in part if key not in known]
            if repr(keyword[1]) in extra:
                message = (
                    f'{path}{f" ({kind})" if kind else ""} has no argument '
                    f'{", ".join(extra)}.' + did_you_mean(keyword[1], taken)
                )
                if len(extra) > 1:  # of another type, from a base
                    message += ' _delete_=True keeps those of a base away.'
                yield message
        elif 'must contain the key "type"' in text and 'type' not in part:
            if path.endswith(('norm_cfg', 'conv_cfg', 'act_cfg')):
                yield f"{path} has no type, such as dict(type='BCN', ...)"


def _component(name: str) -> Tuple[Any, List[str]]:
    """What a name means in any registry, and the names that there are."""
    try:
        from mmcv import ops  # which MMDetection takes by name, as it does nms
    except ImportError:  # mmcv-lite
        ops = None
    if hasattr(ops, name):
        return getattr(ops, name), []
    names: List[str] = []
    for registry in vars(root).values():
        if isinstance(registry, Registry):
            with registry.switch_scope_and_registry(None) as scoped:
                try:
                    found = scoped.get(name)
                except (ImportError, RuntimeError):  # nothing of this name
                    found = None
                if found is not None:
                    return found, []
                names += [*scoped.module_dict, *registry.module_dict]
    return None, sorted(set(names))


def _dicts(cfg: Any, path: str = '') -> Iterator[Tuple[str, dict]]:
    """All dicts in a config, with their paths."""
    if isinstance(cfg, (list, tuple)):
        for index, part in enumerate(cfg):
            yield from _dicts(part, f'{path}.{index}')
    elif isinstance(cfg, (dict, Config)):
        if path:
            yield path, cfg
        for key, part in cfg.items():
            yield from _dicts(part, f'{path}.{key}' if path else key)
