import os
import os.path as osp
import re
import shutil
import subprocess
import sys

import pytest

ROOT = osp.abspath(osp.join(osp.dirname(__file__), '../..'))
INPUTS = (
    'setup.py',
    'pyproject.toml',
    'tools/setup_env.sh',
    'tools/build_mmcv.sh',
    'wsbcn_mm/functional/kernels/compiled.cpp',
)


@pytest.mark.parametrize('gpu', [False, True])
def test_a_gpu_without_nvcc_is_told_before_the_compiling(tmp_path, gpu):
    """The script runs with stand-ins for what it calls."""
    for name in INPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(osp.join(ROOT, name), tmp_path / name)
    stand_ins = {
        'bin/nvidia-smi': f'exit {int(not gpu)}',
        '.venv/bin/pip': 'exit 0',
        '.venv/bin/python': (
            'case "$*" in *version.cuda*) echo 13.0;; '
            '*is_available*) exit 1;; *\\ download\\ *) echo "$*";; esac'
        ),
    }
    for name, body in stand_ins.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\n{body}\n')
        path.chmod(0o755)
    environment = {
        'PATH': f'{tmp_path}/bin{os.pathsep}/usr/bin{os.pathsep}/bin',
        'PYTHON': shutil.which('python3'),
        'WSBCN_CACHE': str(tmp_path / 'cache'),
    }
    done = subprocess.run(
        ['bash', 'tools/setup_env.sh'],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    notice, compiling, _ = done.stdout.partition('Compiling mmcv')
    assert compiling, done.stderr
    assert ('RoIAlign, NMS and' in notice) == gpu
    assert ("in torch's version (13.0)" in notice) == gpu
    # Or pip would give what it once compiled for any torch.
    log = (tmp_path / '.venv/setup_env.log').read_text()
    assert '--no-cache-dir' in log


def test_mmcv_is_compiled_in_the_c_plus_plus_that_torch_asks_for(tmp_path):
    """With a stand-in for pip, and this torch."""
    source = tmp_path / 'mmcv-2.1.0'
    source.mkdir()
    (source / 'setup.py').write_text("cxx=['-Wall', '-std=c++14']\n")
    subprocess.run(
        ['tar', '-czf', 'mmcv.tar.gz', source.name], cwd=tmp_path, check=True
    )
    python = tmp_path / 'python'
    python.write_text(
        f"""#!/bin/sh
for last; do :; done
case "$*" in
*\\ download\\ *) while [ "$1" != -d ]; do shift; done
    cp {tmp_path}/mmcv.tar.gz "$2";;
*\\ wheel\\ *) cp "$last/setup.py" {tmp_path}/compiled;;
*) exec {sys.executable} "$@";;
esac
"""
    )
    python.chmod(0o755)
    subprocess.run(
        ['bash', osp.join(ROOT, 'tools/build_mmcv.sh'), tmp_path / 'wheels'],
        check=True,
        env={**os.environ, 'PYTHON': str(python)},
    )
    compiled = (tmp_path / 'compiled').read_text()
    standard = re.fullmatch(r"cxx=\['-Wall', '-std=c\+\+(\d\d)'\]\n", compiled)
    assert int(standard[1]) >= 17  # since torch 2.1
    assert (tmp_path / 'wheels').is_dir()


@pytest.mark.parametrize(
    'name, has, message',
    [
        ('nowhere', '', "no interpreter '{}'"),
        ('python', 'nothing', "'{}' has no torch to compile for"),
        ('python', 'torch', "mmcv's setup fails on Python 3.13"),
        ('python', 'torch*|*version_info', "pip install 'setuptools<80'"),
    ],
)
def test_what_mmcv_needs_is_said_at_once(tmp_path, name, has, message):
    """With a stand-in for a Python that has little."""
    python = tmp_path / 'python'
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *{has}*) echo 17;; *) exit 1;; esac\n'
    )
    python.chmod(0o755)
    path = str(tmp_path / name)
    done = subprocess.run(
        ['bash', osp.join(ROOT, 'tools/build_mmcv.sh')],
        env={**os.environ, 'PYTHON': path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith('error: ')
    assert message.format(path) in done.stderr
