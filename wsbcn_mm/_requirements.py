"""A clear message at import, in place of hard dependencies.

OpenMMLab's packages and those of the maintained fork install the same
modules, so depending on either would overwrite the other.
"""

import importlib

MINIMUM = {'torch': '2.4', 'mmengine': '0.10.0', 'mmcv': '2.0.0'}


def _release(version: str) -> tuple:
    parts = version.split('+')[0].split('.')
    return tuple(int(''.join(filter(str.isdigit, p)) or 0) for p in parts[:3])


def check_requirements() -> None:
    """Raise ImportError if a required package is missing or too old."""
    advice = (
        "Install one of the two stacks first: 'bash tools/setup_env.sh' "
        'in a checkout of wsbcn_mm makes an environment, or install '
        'torch, mmengine and mmcv (with its ops) as their pages say.'
    )
    for name, minimum in MINIMUM.items():
        try:
            version = importlib.import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'wsbcn_mm needs {name} >= {minimum}, which is '
                f'not installed. {advice}'
            ) from None
        if _release(version) < _release(minimum):
            raise ImportError(
                f'wsbcn_mm needs {name} >= {minimum}, but '
                f'{name} {version} is installed. {advice}'
            )
