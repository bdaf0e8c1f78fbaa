"""Train with any config of MMDetection, MMSegmentation or MMPretrain."""

import argparse

import wsbcn_mm  # noqa: F401  registers the layers and the compatibility
from wsbcn_mm.engine.checkpoint import newest_checkpoint
from wsbcn_mm.engine.command_line import (
    UsageError,
    add_common_arguments,
    build_runner,
    check_amp,
    check_checkpoint,
    check_datasets,
    check_pretrained,
    check_scaled_lr,
    check_started,
    check_training_set,
    check_update_rate,
    check_work_dir,
    load_config,
    run,
)
from wsbcn_mm.engine.mistakes import mistakes_explained


def parse_args():
    parser = argparse.ArgumentParser(description='Train a model')
    parser.add_argument('config', help='train config file path')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='a checkpoint to resume from, or none to resume from the '
        'latest in the work directory',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train with automatic mixed precision',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args)
    check_work_dir(cfg.work_dir)
    if args.amp:
        check_amp()
        kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise UsageError(
                f'--amp replaces an OptimWrapper; optim_wrapper of the '
                f'config is a {kind}.'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
            raise UsageError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size='
                '...) in the config: the batch size that its learning rate '
                'is for.'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('resume') and not cfg.get('load_from'):
        if 'runner_type' not in cfg:
            cfg.load_from = newest_checkpoint(cfg.work_dir)
    elif cfg.get('load_from') is not None:
        check_checkpoint(cfg.load_from)
    check_pretrained(cfg)
    check_datasets(cfg, 'train_dataloader', 'val_dataloader')
    with mistakes_explained(cfg):
        runner = build_runner(cfg)
        if args.auto_scale_lr:
            check_scaled_lr(runner)
        check_update_rate(runner)
        check_started(cfg, runner.model)
        check_training_set(runner)
        runner.train()


if __name__ == '__main__':
    run(main)
