"""Sum up a quickstart run: metrics.json and a table."""

import argparse
import glob
import json
import os
import os.path as osp
import sys

from rich.console import Console
from rich.table import Table

METRICS = ('bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50')
NEXT = """\
Next, on COCO (in data/coco), one image at a time on one GPU:
  python tools/train.py \
configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_1xb1-1x_coco.py
On 8 GPUs, still 16 images an update:
  bash tools/dist_train.sh \
configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_1xb1-1x_coco.py 8 \
--cfg-options optim_wrapper.accumulative_counts=2 param_scheduler.0.end=1000
Your own config: see docs/configs.md."""


def parse_args():
    parser = argparse.ArgumentParser(description='Sum up a quickstart run')
    parser.add_argument('work_dir')
    parser.add_argument(
        '--seconds',
        type=int,
        help='what training and evaluation took: writes metrics.json',
    )
    parser.add_argument(
        '--resumed',
        action='store_true',
        help='the seconds are those of the last part only',
    )
    return parser.parse_args()


def evaluated(work_dir: str) -> dict:
    """The metrics that tools/test.py wrote last."""
    paths = glob.glob(osp.join(work_dir, 'test', '*', '*.json'))
    if not paths:
        sys.exit(f'error: tools/test.py has left no metrics in {work_dir}')
    with open(max(paths, key=osp.getmtime)) as f:
        metrics = json.load(f)
    return {name: metrics[f'coco/{name}'] for name in METRICS}


def main():
    args = parse_args()
    path = osp.join(args.work_dir, 'metrics.json')
    if args.seconds is not None:
        metrics = dict(evaluated(args.work_dir), seconds=args.seconds)
        if args.resumed:
            metrics['resumed'] = True
        with open(path + '.tmp', 'w') as f:
            json.dump(metrics, f, indent=2)
        os.replace(path + '.tmp', path)
    with open(path) as f:
        metrics = json.load(f)
    table = Table(title='One image at a time')
    table.add_column('digit scenes')
    for column in ('AP', 'AP50'):
        table.add_column(column, justify='right')
    for kind in ('bbox', 'segm'):
        table.add_row(
            {'bbox': 'boxes', 'segm': 'masks'}[kind],
            f'{metrics[f"{kind}_mAP"]:.3f}',
            f'{metrics[f"{kind}_mAP_50"]:.3f}',
        )
    console = Console()
    console.print(table)
    console.print(
        f'Training and evaluation took {metrics["seconds"]} s'
        + (' since it was resumed.' if metrics.get('resumed') else '.')
    )
    console.print(f'Metrics:  {path}', soft_wrap=True)
    console.print(
        f'Pictures: {osp.join(args.work_dir, "predictions.png")}\n',
        soft_wrap=True,
    )
    console.print(NEXT, soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main()
