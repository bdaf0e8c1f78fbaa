"""The two compiled ops that a training step of Mask R-CNN takes from mmcv.

mmcv publishes no wheels for current torch, and compiling it for a GPU takes a
while. torchvision's wheels have the same two ops, so a step can be timed
without mmcv's: with mmcv-lite, or an mmcv that was compiled for CPUs.

Import this before mmdet, which looks for the compiled module when imported.
"""

import argparse
import importlib
import sys
import types

import torch
import torchvision

OPS = ('nms', 'roi_align')


class _TorchvisionOps(types.ModuleType):
    """What mmcv's Python asks of its compiled module."""

    def __getattr__(self, name: str):
        def missing(*args, **kwargs):
            raise NotImplementedError(
                f'mmcv.ops: {name} is not compiled, and is none of the ops '
                'that a training step of Mask R-CNN takes.'
            )

        if name.startswith('__'):  # a question of Python's, not of mmcv's
            raise AttributeError(name)
        return missing

    def nms(self, boxes, scores, iou_threshold, offset):
        if offset:
            raise NotImplementedError(f'nms: offset={offset}, expected 0.')
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    def roi_align_forward(
        self, input, rois, output, argmax_y, argmax_x, **settings
    ):
        output.copy_(
            torch.ops.torchvision.roi_align(input, rois, *_roi_align(settings))
        )

    def roi_align_backward(
        self, grad_output, rois, argmax_y, argmax_x, grad_input, **settings
    ):
        scale, height, width, samples, aligned = _roi_align(settings)
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                grad_output, rois, scale, height, width,
                *grad_input.shape, samples, aligned,
            )
        )  # fmt: skip


def _roi_align(settings: dict) -> tuple:
    if settings['pool_mode'] != 1:
        raise NotImplementedError("roi_align: expected pool_mode='avg'.")
    return tuple(
        settings[name]
        for name in (
            *('spatial_scale', 'aligned_height', 'aligned_width'),
            *('sampling_ratio', 'aligned'),
        )
    )


TORCHVISION_OPS = _TorchvisionOps('mmcv._ext')
try:
    importlib.import_module(TORCHVISION_OPS.__name__)
except ImportError:  # mmcv-lite, with which mmdet is not even imported
    sys.modules[TORCHVISION_OPS.__name__] = TORCHVISION_OPS
import mmcv.ops  # noqa: E402


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--ops',
        default='auto',
        choices=['auto', 'mmcv', 'torchvision'],
        help="whose NMS and RoIAlign; auto: mmcv's if they are compiled for "
        "the device, else torchvision's",
    )


def choose(ops: str, device: str) -> str:
    """Let mmcv's Python call these ops; returns whose they are."""
    modules = [sys.modules[f'mmcv.ops.{name}'] for name in OPS]
    if ops != 'torchvision' and _are_compiled(modules, device):
        return 'mmcv'
    if ops == 'mmcv':
        raise SystemExit(
            f"error: mmcv's ops are not compiled for {device}. Compile them "
            '(tools/setup_env.sh, WITH_CUDA=1 for a GPU), or give --ops '
            'torchvision.'
        )
    for module in modules:
        module.ext_module = TORCHVISION_OPS
    return 'torchvision'


def _are_compiled(modules: list, device: str) -> bool:
    if any(module.ext_module is TORCHVISION_OPS for module in modules):
        return False
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    try:
        mmcv.ops.nms(boxes, boxes[:, 0] + 1, 0.5)
    except RuntimeError:  # for a processor, but not for a GPU
        return False
    return True
