"""Test with any config of MMDetection, MMSegmentation or MMPretrain."""

import argparse
import copy

from mmengine.config import ConfigDict
from mmengine.evaluator import DumpResults

import wsbcn_mm  # noqa: F401  registers the layers and the compatibility
from wsbcn_mm.engine.command_line import (
    UsageError,
    add_common_arguments,
    build_runner,
    check_checkpoint,
    check_datasets,
    check_testable,
    check_work_dir,
    load_config,
    run,
)
from wsbcn_mm.engine.mistakes import mistakes_explained

# What averages over flipped images, where the config does not say.
TTA_MODELS = {
    'mmdet': dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
    'mmseg': dict(type='SegTTAModel'),
    'mmpretrain': dict(type='AverageClsScoreTTA'),
}


def parse_args():
    parser = argparse.ArgumentParser(description='Test and evaluate a model')
    parser.add_argument('config', help='test config file path')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', help='write the predictions to this .pkl')
    parser.add_argument(
        '--show', action='store_true', help='show the predictions'
    )
    parser.add_argument(
        '--show-dir',
        help='write pictures of the predictions to this folder, in the work '
        'directory of the run',
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds of each --show'
    )
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation'
    )
    add_common_arguments(parser)
    return parser.parse_args()


def draw(cfg, args) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(
            '--show and --show-dir need default_hooks.visualization in the '
            'config, as default_runtime.py of each library has it.'
        )
    switch = 'enable' if cfg.default_scope == 'mmpretrain' else 'draw'
    hook[switch] = True
    hook.interval = 1
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir:
        if cfg.default_scope == 'mmdet':
            hook.test_out_dir = args.show_dir
        elif cfg.default_scope == 'mmpretrain':
            hook.out_dir = args.show_dir
        else:
            cfg.visualizer.save_dir = args.show_dir


def augment(cfg) -> None:
    """Average over each image and its mirror image, or as the config says."""
    model = cfg.get('tta_model') or TTA_MODELS[cfg.default_scope]
    if model['type'] == 'DetTTAModel' and (
        'mask_head' in cfg.model
        or 'mask_head' in cfg.model.get('roi_head', {})
    ):
        raise UsageError(
            '--tta: MMDetection merges boxes, not masks. Leave it out for '
            f'{cfg.model.type}.'
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    pipeline = cfg.get('tta_pipeline')
    if pipeline is None:
        pipeline = copy.deepcopy(dataset.pipeline)
        pack = pipeline[-1]
        if 'meta_keys' in pack:
            pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
    dataset.pipeline = pipeline
    cfg.model = ConfigDict(**model, module=cfg.model)


def main():
    args = parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise UsageError(f'--out must end with .pkl, got {args.out!r}')
    cfg = load_config(args)
    check_work_dir(cfg.work_dir)
    check_checkpoint(args.checkpoint)
    check_testable(cfg)
    check_datasets(cfg, 'test_dataloader')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        draw(cfg, args)
    if args.tta:
        augment(cfg)
    with mistakes_explained(cfg):
        runner = build_runner(cfg, needs_all_weights=True)
        if args.out is not None:
            dump = DumpResults
            if cfg.default_scope == 'mmdet':  # which encodes the masks
                from mmdet.evaluation import DumpDetResults as dump
            runner.test_evaluator.metrics.append(dump(out_file_path=args.out))
        runner.test()


if __name__ == '__main__':
    run(main)
