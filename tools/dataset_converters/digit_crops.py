"""Crops of the objects of digit scenes: a data set to classify.

Writes OUT/{train,val}/<digit>/*.png, the folders that MMPretrain's
``CustomDataset`` reads. Training crops are of training scenes only.
"""

import argparse
import json
import os
import os.path as osp
import shutil
import sys

import cv2


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scenes', default='data/digit_scenes')
    parser.add_argument('--out', default='data/digit_crops')
    parser.add_argument('--size', type=int, default=48, help='in pixels')
    parser.add_argument(
        '--context',
        type=float,
        default=1.3,
        help="a crop's side, in longer sides of its object",
    )
    return parser.parse_args()


def crop(image, box, size: int, context: float):
    x, y, width, height = box
    side = max(width, height) * context
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    begin = [max(round(v), 0) for v in (top, left)]
    part = image[
        begin[0] : max(round(top + side), begin[0] + 1),
        begin[1] : max(round(left + side), begin[1] + 1),
    ]
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)


def convert(args, split: str) -> int:
    path = osp.join(args.scenes, 'annotations', f'instances_{split}.json')
    if not osp.isfile(path):
        sys.exit(
            f'error: no {path!r}. Make the scenes first: python '
            f'tools/dataset_converters/digit_scenes.py --out {args.scenes}'
        )
    with open(path) as f:
        coco = json.load(f)
    names = {c['id']: c['name'] for c in coco['categories']}
    files = {i['id']: i['file_name'] for i in coco['images']}
    folder = osp.join(args.out, split)
    shutil.rmtree(folder, ignore_errors=True)
    for name in names.values():
        os.makedirs(osp.join(folder, name))
    images = {}
    for annotation in coco['annotations']:
        number = annotation['image_id']
        if number not in images:
            images = {
                number: cv2.imread(
                    osp.join(args.scenes, 'leftImg8bit', split, files[number])
                )
            }
        cv2.imwrite(
            osp.join(
                folder,
                names[annotation['category_id']],
                f'{annotation["id"]:06d}.png',
            ),
            crop(images[number], annotation['bbox'], args.size, args.context),
        )
    return len(coco['annotations'])


def main():
    args = parse_args()
    counts = {split: convert(args, split) for split in ('train', 'val')}
    print(f'{args.out}: {counts["train"]} crops, {counts["val"]} to validate')


if __name__ == '__main__':
    main()
