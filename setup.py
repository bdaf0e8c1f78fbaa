import os
import os.path as osp
import shutil
import sys
import zlib

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

HERE = osp.dirname(osp.abspath(__file__))


class BuildWithMim(build_py):
    """Put configs and tools where OpenMMLab's packages keep theirs.

    ``wsbcn_mm/.mim`` is what ``_base_ = 'wsbcn_mm::...'`` and ``mim`` look
    into: links in an editable install, copies in a wheel.
    """

    # MANIFEST.in puts them into an sdist.
    names = ('configs', 'tools', 'model-index.yml')

    def run(self):
        super().run()
        if self.editable_mode:
            folder = osp.join(HERE, 'wsbcn_mm', '.mim')
        else:
            folder = osp.join(self.build_lib, 'wsbcn_mm', '.mim')
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        for name in self.names:
            source, target = osp.join(HERE, name), osp.join(folder, name)
            if self.editable_mode:
                os.symlink(osp.relpath(source, folder), target)
            elif osp.isdir(source):
                shutil.copytree(
                    source,
                    target,
                    ignore=shutil.ignore_patterns('__pycache__'),
                )
            else:
                shutil.copy(source, target)


def extensions() -> list:
    """The kernels for processors: plain C functions, a second to compile.

    Optional, so without a compiler the package installs all the same, and
    runs on PyTorch's own operations. OpenMP comes with torch, so nothing is
    linked: a second copy of it would have threads of its own.
    """
    if sys.platform != 'linux':
        return []
    source = osp.join('wsbcn_mm', 'functional', 'kernels', 'compiled.cpp')
    with open(osp.join(HERE, source), 'rb') as f:
        checksum = zlib.crc32(f.read())
    return [
        Extension(
            'wsbcn_mm.functional.kernels._compiled',
            sources=[source],
            define_macros=[('WSBCN_MM_CHECKSUM', str(checksum))],
            extra_compile_args=[
                '-O3',
                '-std=c++14',
                '-fopenmp',
                '-fno-math-errno',
            ],
            language='c++',
            optional=True,
        )
    ]


# Everything else about the package is in pyproject.toml.
setup(
    ext_modules=extensions(),
    cmdclass=dict(build_py=BuildWithMim),
)
