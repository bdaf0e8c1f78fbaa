"""What is shipped must carry all that a checkout has; imports must explain.

The wheels here are built from the sdist.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    # Of a copy, since a build leaves its traces in the source folder.
    folder = tmp_path_factory.mktemp('sdist')
    source = folder / 'source'
    files = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard'],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ('tools/__pycache__/train.pyc', 'wsbcn_mm/_old.so'):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'sdist', '-d', str(folder)],
        check=True,
        cwd=source,
    )
    (path,) = folder.glob('*.tar.gz')
    return path


def build_wheel(sdist, folder, **env):
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps']
        + ['--no-build-isolation', '-w', str(folder), str(sdist)],
        check=True,
        env={**os.environ, **env},
    )
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    return build_wheel(sdist, tmp_path_factory.mktemp('wheel'))


def test_an_sdist_has_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {
            name.partition('/')[2]
            for name in archive.getnames()
            if '.egg-info' not in name
        }
    assert {
        'LICENSE',
        'README.md',
        'model-index.yml',
        'pyproject.toml',
        'configs/mask_rcnn/metafile.yml',
        'tools/train.py',
        'tools/deploy/fold.py',
        'wsbcn_mm/functional/kernels/compiled.cpp',
    } <= names
    source = sdist.parent / 'source'
    for part in ('configs', 'tools'):
        for path in (source / part).rglob('*.py'):
            assert str(path.relative_to(source)) in names
    assert not [n for n in names if '__pycache__' in n or n.endswith('.so')]


def test_a_wheel_works_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / 'site')
    code = """
from pathlib import Path
import wsbcn_mm
from mmengine.config import Config
assert Path(wsbcn_mm.__file__).parts[-3] == 'site', wsbcn_mm.__file__
mim = Path(wsbcn_mm.__file__).parent / '.mim'
assert (mim / 'tools' / 'train.py').is_file()
assert (mim / 'model-index.yml').is_file()
configs = [p for p in (mim / 'configs').glob('mask_rcnn/*.py')]
assert len(configs) > 10
Path('mine.py').write_text(
    f"_base_ = 'wsbcn_mm::mask_rcnn/{configs[0].name}'")
assert Config.fromfile('mine.py').model.type == 'MaskRCNN'
"""
    subprocess.run(
        [sys.executable, '-c', code],
        check=True,
        cwd=tmp_path,
        env={'PYTHONPATH': str(tmp_path / 'site'), 'PATH': '/usr/bin:/bin'},
    )


def test_a_wheel_brings_its_kernels_where_there_is_a_compiler(
    sdist, wheel, tmp_path
):
    def libraries(wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        assert 'wsbcn_mm/functional/kernels/compiled.cpp' in names
        return [name for name in names if name.endswith('.so')]

    assert len(libraries(wheel)) == 1
    assert (
        libraries(build_wheel(sdist, tmp_path, CC='false', CXX='false')) == []
    )


def test_a_wheel_depends_on_neither_stack(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith('METADATA'))
        metadata = archive.read(name).decode()
    required = [
        line
        for line in metadata.splitlines()
        if line.startswith('Requires-Dist') and 'extra ==' not in line
    ]
    assert required == ['Requires-Dist: rich']


@pytest.mark.parametrize('name', ['torch', 'mmengine', 'mmcv'])
@pytest.mark.parametrize('version', [None, '0.1'])
def test_a_missing_or_old_requirement_is_named(name, version, monkeypatch):
    from wsbcn_mm import _requirements

    real = _requirements.importlib.import_module

    def import_module(wanted):
        if wanted == name and version is None:
            raise ModuleNotFoundError(f'No module named {name}', name=name)
        module = real(wanted)
        if wanted == name:
            module = type('module', (), {'__version__': version})
        return module

    monkeypatch.setattr(
        _requirements.importlib, 'import_module', import_module
    )
    with pytest.raises(ImportError) as info:
        _requirements.check_requirements()
    for word in (name, version or 'not installed', 'setup_env.sh'):
        assert word in str(info.value)


def test_no_extra_brings_another_torch_or_an_mmcv_without_ops(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith('/METADATA')]
        lines = file.read(name).decode().splitlines()
    required = {
        re.match(r'[\w-]+', line.split(': ')[1])[0]
        for line in lines
        if line.startswith('Requires-Dist: ')
    }
    assert {'mmdet', 'onedl-mmdetection'} < required
    assert not {'torch', 'torchvision', 'mmcv', 'onedl-mmcv'} & required
