"""What a number depends on besides its settings."""

import importlib.metadata
import os
import platform
import subprocess

PACKAGES = (
    'torch',
    'mmengine',
    'mmcv',
    'mmdet',
    'mmsegmentation',
    'mmpretrain',
    'onedl-mmengine',
    'onedl-mmcv',
    'onedl-mmdetection',
    'onedl-mmsegmentation',
    'onedl-mmpretrain',
    'numpy',
    'scikit-learn',
)


def environment() -> dict:
    """Versions and machine, as JSON."""
    import torch

    import wsbcn_mm

    versions = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions['wsbcn_mm'] = wsbcn_mm.__version__
    return dict(
        versions=versions,
        commit=_commit(),
        system=platform.system(),
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        accelerator=(
            torch.cuda.get_device_name() if torch.cuda.is_available() else None
        ),
    )


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as f:
            for line in f:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit; '+' where files were changed since."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*arguments):
        return subprocess.run(
            ['git', '-C', here, *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', '--short', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
