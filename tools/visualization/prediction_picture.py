"""Draw predicted instances below the ground truth, for a few images.

Reads files in COCO's formats: annotations, and the results that ``CocoMetric``
writes where its ``outfile_prefix`` is set.

Example:
    python tools/test.py CONFIG CHECKPOINT \
        --cfg-options test_evaluator.outfile_prefix=work_dirs/predictions
    python tools/visualization/prediction_picture.py \
        data/digit_scenes/annotations/instances_val.json \
        data/digit_scenes/leftImg8bit/val \
        work_dirs/predictions.segm.json --out predictions.png
"""

import argparse
import io
import os
import os.path as osp
import sys

import cv2
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from PIL import Image  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description='Draw predicted instances below the ground truth'
    )
    parser.add_argument('annotations', help='COCO annotations (.json)')
    parser.add_argument('images', help='folder of the images')
    parser.add_argument('results', help='COCO results with masks (.json)')
    parser.add_argument('--out', required=True, help='the picture (.png)')
    parser.add_argument(
        '--num', type=int, default=4, help='number of images to draw'
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.5, help='least score drawn'
    )
    parser.add_argument(
        '--colours',
        type=int,
        default=96,
        help='of the palette: fewer make a smaller file',
    )
    args = parser.parse_args()
    for path in (args.annotations, args.images, args.results):
        if not osp.exists(path):
            sys.exit(f'error: {path} does not exist')
    return args


def draw(axes, picture, coco, instances, scale: int) -> None:
    """Masks, boxes and class names over a picture."""
    height, width = picture.shape[:2]
    size = (width * scale, height * scale)
    canvas = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    canvas = canvas.astype(float) / 255 * 0.75  # so that colours stand out
    names = []
    for instance in sorted(instances, key=lambda i: i.get('score', 1)):
        number = instance['category_id'] - 1
        colour = np.array(plt.cm.tab10(number % 10)[:3])
        mask = coco.annToMask(instance)
        mask = cv2.resize(mask * 255, size, interpolation=cv2.INTER_CUBIC)
        mask = np.ascontiguousarray(mask > 127, np.uint8)
        canvas[mask > 0] = 0.35 * canvas[mask > 0] + 0.65 * colour
        outline, _ = cv2.findContours(
            mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(canvas, outline, -1, (1.0, 1.0, 1.0), 1)
        x, y, w, h = (scale * v for v in instance['bbox'])
        axes.add_patch(
            plt.Rectangle((x, y), w, h, fill=False, ec=colour, lw=1)
        )
        name = coco.cats[instance['category_id']]['name']
        if 'score' in instance:
            name += f' {100 * instance["score"]:.0f}'
        names.append((x, max(y, 0.08 * size[1]), name))
    axes.imshow(canvas.clip(0, 1))
    for x, y, name in names:
        axes.text(
            x,
            y,
            name,
            color='white',
            fontsize=8,
            weight='bold',
            va='bottom',
            clip_on=True,
            path_effects=[withStroke(linewidth=2, foreground='black')],
        )
    axes.set(xticks=[], yticks=[], xlim=(0, size[0]), ylim=(size[1], 0))
    for spine in axes.spines.values():
        spine.set_visible(False)


def main():
    args = parse_args()
    coco = COCO(args.annotations)
    results = coco.loadRes(args.results)
    chosen = list(coco.imgs.values())[: args.num]
    figure, rows = plt.subplots(
        2,
        len(chosen),
        figsize=(2.4 * len(chosen) + 0.25, 4.85),
        squeeze=False,
        dpi=110,
    )
    for column, image in enumerate(chosen):
        path = osp.join(args.images, image['file_name'])
        picture = cv2.imread(path)
        if picture is None:
            sys.exit(f'error: cannot read {path}')
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        scale = max(1, round(640 / max(picture.shape)))
        truth = coco.imgToAnns[image['id']]
        found = [
            result
            for result in results.imgToAnns[image['id']]
            if result['score'] >= args.score_thr
        ]
        draw(rows[0, column], picture, coco, truth, scale)
        draw(rows[1, column], picture, coco, found, scale)
    rows[0, 0].set_ylabel('ground truth')
    rows[1, 0].set_ylabel('prediction, score in %')
    figure.tight_layout(pad=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    os.makedirs(osp.dirname(osp.abspath(args.out)), exist_ok=True)
    Image.open(buffer).convert('RGB').quantize(
        args.colours, dither=Image.Dither.NONE
    ).save(args.out, optimize=True)
    print(f'Drew {len(chosen)} images into {args.out}')


if __name__ == '__main__':
    main()
