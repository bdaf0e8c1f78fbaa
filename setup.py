import os
import os.path as osp
import shutil
import sys
import zlib

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

HERE = osp.dirname(osp.abspath(__file__))


def version() -> str:
    namespace = {}
    with open(osp.join(HERE, 'wsbcn_mm', 'version.py')) as f:
        exec(f.read(), namespace)
    return namespace['__version__']


def readme() -> str:
    with open(osp.join(HERE, 'README.md'), encoding='utf-8') as f:
        return f.read()


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


setup(
    name='wsbcn_mm',
    version=version(),
    description='Train detectors and segmenters with 1-2 images per GPU: '
    'Batch-Channel Normalization and Weight Standardization for OpenMMLab',
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, object detection, segmentation, normalization',
    packages=find_packages(include=['wsbcn_mm', 'wsbcn_mm.*']),
    package_data={'wsbcn_mm.functional.kernels': ['compiled.cpp']},
    ext_modules=extensions(),
    cmdclass=dict(build_py=BuildWithMim),
    python_requires='>=3.9',
    # torch, mmengine and mmcv are checked at import instead: OpenMMLab's
    # packages and the maintained fork's install the same modules, and a
    # dependency on one would overwrite the other.
    install_requires=['rich'],
    # Neither are torch and mmcv among the extras: pip cannot compile mmcv's
    # ops by itself, and would bring another torch than they are compiled for.
    extras_require={
        'openmmlab': [
            'mmengine>=0.10.0',
            'mmdet>=3.0.0',
            'mmsegmentation>=1.0.0',
            'mmpretrain>=1.0.0',
            'ftfy',
            'regex',
            'setuptools<80',
        ],
        'onedl': [
            'onedl-mmengine',
            'onedl-mmdetection',
            'onedl-mmsegmentation',
            'onedl-mmpretrain',
            'ftfy',
            'regex',
            'setuptools<80',
        ],
        'digits': ['scikit-learn'],
        'plots': ['matplotlib'],
        'deploy': ['onnx', 'onnxruntime', 'onnxscript'],
        'tests': [
            'pytest',
            'pytest-timeout',
            'hypothesis',
            'ruff',
            'timm',
            'tensorboard',
            'scikit-learn',
            'onnx',
            'onnxruntime',
            'onnxscript',
        ],
    },
    zip_safe=False,
)
