"""Digit scenes: a small data set for detection and segmentation, no download.

Real handwritten digits (the 1,797 that scikit-learn ships) lie as objects on
procedural textured ground, among clutter, occluding one another. One run
writes the same images with two kinds of labels::

    OUT/leftImg8bit/{train,val}/scenes/*_leftImg8bit.png
    OUT/gtFine/{train,val}/scenes/*_gtFine_labelTrainIds.png  (Cityscapes)
    OUT/annotations/instances_{train,val}.json                (COCO)
    OUT/manifest.json                             (what was made, and how)

so the loaders, metrics and configs of MMDetection and MMSegmentation are the
real ones. No digit of the training images appears in a validation image. The
same arguments give the same files, byte for byte.

``--spread`` says how much one image differs from the next in illumination,
contrast, colour, texture, object count and size: 0 is one camera in front of
one table, 0.5 is about as photographs of different places, 1 has nothing in
common. It is what separates normalizing with the statistics of one image from
normalizing with those of many, so its effect is measured: the manifest and the
last lines printed hold the share of the pixel variance that lies between
images.

Example:
    python tools/dataset_converters/digit_scenes.py --out data/digit_scenes
"""

import argparse
import json
import os
import os.path as osp
import shutil
import sys

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import track
from rich.table import Table

NAME = 'digit_scenes'
VERSION = 1
MANIFEST = 'manifest.json'
MARKER = f'.{NAME}'  # the first file of an unfinished data set
CLASSES = tuple(str(digit) for digit in range(10))
SPLITS = ('train', 'val')
MIN_VISIBLE = 0.8  # of a digit, after all that lies over it
MIN_PIXELS = 24  # visible ones, for a digit to count as an object


def parse_args(args=None):
    parser = argparse.ArgumentParser(
        description='Make digit scenes, labelled as COCO instances and as '
        'Cityscapes semantic segmentation'
    )
    parser.add_argument(
        '--out', default='data/digit_scenes', help='folder to make'
    )
    parser.add_argument(
        '--num-train', type=int, default=600, help='training images'
    )
    parser.add_argument(
        '--num-val', type=int, default=60, help='validation images'
    )
    parser.add_argument(
        '--image-size', type=int, default=160, help='width and height'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--spread',
        type=float,
        default=0.4,
        help='how much images differ, 0 (all alike) to 1 (nothing in '
        'common); photographs are at about 0.5',
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace digit scenes made with other arguments',
    )
    args = parser.parse_args(args)
    for name, minimum in (
        ('num_train', 1),
        ('num_val', 1),
        ('image_size', 64),
        ('seed', 0),
    ):
        if getattr(args, name) < minimum:
            parser.error(
                f'--{name.replace("_", "-")} must be at least {minimum}, '
                f'got {getattr(args, name)}'
            )
    if not 0 <= args.spread <= 1:
        parser.error(f'--spread must lie in [0, 1], got {args.spread}')
    return args


# --- digits ---------------------------------------------------------------


def load_glyphs(seed: int):
    """The digits, split for good: {split: [(index, label, 8x8 in [0, 1])]}."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit(
            'error: the digits come from scikit-learn, which is not '
            "installed: pip install scikit-learn (or 'wsbcn_mm[digits]')"
        )
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng([seed, 97]).permutation(len(images))
    cut = len(order) * 3 // 4
    return {
        split: [(int(i), int(labels[i]), images[i]) for i in part]
        for split, part in zip(SPLITS, (order[:cut], order[cut:]))
    }


def render_glyph(glyph, height: float, angle: float, shear: float, bold):
    """Opacity of a digit, upsampled smoothly, tilted and cropped."""
    size = int(np.ceil(height * 2))
    padded = np.pad(glyph, 1)
    zoom = height / 8
    tilt = np.deg2rad(angle)
    linear = zoom * np.array(
        [
            [np.cos(tilt), -np.sin(tilt) + shear],
            [np.sin(tilt), np.cos(tilt)],
        ]
    )
    centre = np.array([size / 2, size / 2])
    shift = centre - linear @ np.array([4.5, 4.5])
    soft = cv2.warpAffine(
        padded,
        np.hstack([linear, shift[:, None]]),
        (size, size),
        flags=cv2.INTER_CUBIC,
    )
    # An edge one pixel wide, whatever the zoom.
    opacity = np.clip((soft - bold) * zoom * 1.2 + 0.5, 0, 1)
    ys, xs = np.nonzero(opacity > 0)
    if len(ys) == 0:
        return np.zeros((1, 1), np.float32)
    return opacity[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


# --- a scene --------------------------------------------------------------


def between(rng, low, high, spread):
    """Uniform about the middle of a range, over ``spread`` of its width."""
    middle, half = (low + high) / 2, (high - low) / 2
    return middle + half * spread * rng.uniform(-1, 1)


def noise(rng, size: int, cells: float):
    """Smooth noise of zero mean and unit deviation, ``cells`` across."""
    cells = max(2, int(round(cells)))
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    field = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return (field - field.mean()) / (field.std() + 1e-6)


def colour(rng, hue, saturation, value):
    """An RGB colour in [0, 1]."""
    pixel = np.array([[[hue % 360, saturation, value]]], np.float32)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0]


def paint_ground(rng, size: int, spread: float):
    """Textured ground, (size, size, 3) in [0, 1]."""
    hue = 40 + spread * rng.uniform(-180, 180)
    value = between(rng, 0.2, 0.8, spread)
    base = colour(rng, hue, between(rng, 0, 0.6, spread), value)
    other = colour(
        rng,
        hue + spread * rng.uniform(-60, 60),
        between(rng, 0, 0.7, spread),
        np.clip(value + between(rng, -0.25, 0.35, spread), 0.05, 0.95),
    )
    coarse = between(rng, 2, 10, spread)
    field = noise(rng, size, coarse)
    field = field + between(rng, 0.1, 0.9, spread) * noise(
        rng, size, coarse * 4
    )
    kind = rng.choice(4, p=[1 - 0.75 * spread] + [0.25 * spread] * 3)
    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    tilt = rng.uniform(0, np.pi)
    along = xs * np.cos(tilt) + ys * np.sin(tilt)
    across = ys * np.cos(tilt) - xs * np.sin(tilt)
    period = rng.uniform(8, 28)
    if kind == 1:  # planks
        field = 0.4 * field + np.sin(
            2 * np.pi * along / period + 0.5 * noise(rng, size, 4)
        )
    elif kind == 2:  # tiles
        field = 0.4 * field + np.sign(
            np.sin(np.pi * along / period) * np.sin(np.pi * across / period)
        )
    elif kind == 3:  # gravel
        field = 0.4 * field + np.abs(noise(rng, size, size / 4))
    amount = 1 / (1 + np.exp(-field * between(rng, 0.4, 2.4, spread)))
    return base + (other - base) * amount[..., None], (base + other) / 2


def paint(image, opacity, x: int, y: int, paint_colour):
    """Lay a shape over the image in place; where its pixels now are."""
    size = image.shape[0]
    covered = np.zeros((size, size), bool)
    height, width = opacity.shape
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + height, size), min(x + width, size)
    if top >= bottom or left >= right:
        return covered
    part = opacity[top - y : bottom - y, left - x : right - x]
    region = image[top:bottom, left:right]
    region += (paint_colour - region) * part[..., None]
    covered[top:bottom, left:right] = part > 0.5
    return covered


def clutter_shape(rng, size: int):
    """Opacity of a thing that is no digit: a stick, a disc, a block."""
    length = rng.uniform(0.06, 0.22) * size
    box = int(np.ceil(length * 1.6)) + 4
    canvas = np.zeros((box, box), np.uint8)
    middle = (box // 2, box // 2)
    kind = rng.integers(3)
    half = max(2, int(length / 2))
    thin = max(1, int(length * rng.uniform(0.08, 0.3)))
    angle = rng.uniform(0, 180)
    if kind == 0:
        reach = np.array([np.cos(angle), np.sin(angle)]) * half
        ends = [(int(box / 2 + k * reach[0]), int(box / 2 + k * reach[1]))
                for k in (-1, 1)]  # fmt: skip
        cv2.line(canvas, *ends, 255, thin, cv2.LINE_AA)
    elif kind == 1:
        axes = (half // 2 + 1, max(2, int(half * rng.uniform(0.2, 0.5))))
        cv2.ellipse(canvas, middle, axes, angle, 0, 360, 255, -1, cv2.LINE_AA)
    else:
        corners = cv2.boxPoints(((box / 2, box / 2), (half, thin), angle))
        cv2.fillPoly(canvas, [corners.astype(np.int32)], 255, cv2.LINE_AA)
    return canvas.astype(np.float32) / 255


def contrasting(rng, ground, least: float):
    """A colour that can be told from the ground's mean colour."""
    while True:
        candidate = colour(
            rng,
            rng.uniform(0, 360),
            rng.uniform(0.2, 1),
            rng.uniform(0.1, 1),
        )
        if np.abs(candidate - ground).max() > least:
            return candidate


def photograph(rng, image, spread: float):
    """Light, exposure and sensor: [0, 1] floats to 8 bits."""
    size = image.shape[0]
    ys, xs = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    tilt = rng.uniform(0, 2 * np.pi)
    light = 1 + spread * rng.uniform(0, 0.7) * (
        xs * np.cos(tilt) + ys * np.sin(tilt)
    )
    cast = np.exp(0.16 * spread * rng.standard_normal(3))
    image = image * light[..., None] * cast
    contrast = np.exp(np.clip(0.4 * spread * rng.standard_normal(), -0.7, 0.5))
    middle = image.mean()
    image = middle + (image - middle) * contrast
    image = image * np.exp(
        np.clip(0.45 * spread * rng.standard_normal(), -0.9, 0.7)
    )
    blur = max(0.0, between(rng, -0.4, 0.9, spread))
    if blur > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    grain = between(rng, 0.005, 0.04, spread)
    image = image + grain * rng.standard_normal(image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def make_scene(rng, glyphs, size: int, spread: float):
    """An RGB image, and its digits: [(index, label, visible mask)]."""
    image, ground = paint_ground(rng, size, spread)
    image = np.ascontiguousarray(image, np.float64)
    for _ in range(rng.integers(3, 9)):
        shape = clutter_shape(rng, size)
        x, y = rng.integers(-shape.shape[0] // 2, size, 2)
        paint(image, shape, x, y, contrasting(rng, ground, 0.1))

    digits = []  # [index, label, visible mask, pixels when alone]
    crowd = np.clip(0.6 * spread * rng.standard_normal(), -1.5, 0.5)
    count = int(round(10 * np.exp(crowd)))
    zoom = 0.22 * size * np.exp(0.3 * spread * rng.uniform(-1, 1))
    for _ in range(max(1, count)):
        index, label, glyph = glyphs[rng.integers(len(glyphs))]
        opacity = render_glyph(
            glyph,
            zoom * np.exp((0.1 + 0.25 * spread) * rng.uniform(-1, 1)),
            angle=rng.uniform(-15, 15),
            shear=rng.uniform(-0.15, 0.15),
            bold=rng.uniform(0.36, 0.5),
        )
        ink = contrasting(rng, ground, 0.4)
        for _ in range(20):
            y = int(rng.integers(0, max(1, size - opacity.shape[0])))
            x = int(rng.integers(0, max(1, size - opacity.shape[1])))
            if _lay(image, digits, opacity, x, y, ink, size):
                digits[-1][:2] = index, label
                break
    for _ in range(rng.integers(0, 4)):  # clutter over the digits
        shape = clutter_shape(rng, size)
        x, y = rng.integers(-shape.shape[0] // 2, size, 2)
        _lay(
            image,
            digits,
            shape,
            int(x),
            int(y),
            contrasting(rng, ground, 0.2),
            size,
            digit=False,
        )
    pixels = photograph(rng, image, spread)
    return pixels, [tuple(d[:3]) for d in digits]


def _lay(image, digits, opacity, x, y, ink, size, digit=True) -> bool:
    """Lay a shape, unless it would hide too much of a digit below it."""
    probe = np.zeros((size, size, 1))
    covered = paint(probe, opacity, x, y, np.ones(1))
    if digit and covered.sum() < MIN_PIXELS:
        return False
    for _, _, visible, alone in digits:
        left = (visible & ~covered).sum()
        if left < max(MIN_VISIBLE * alone, MIN_PIXELS):
            return False
    if digit:  # a soft shadow below and to the right
        shadow = cv2.GaussianBlur(np.pad(opacity, 4), (0, 0), 1.5) * 0.5
        paint(image, shadow, x - 2, y - 2, image.mean(axis=(0, 1)) * 0.3)
    paint(image, opacity, x, y, ink)
    for other in digits:
        other[2] = other[2] & ~covered
    if digit:
        digits.append([None, None, covered, covered.sum()])
    return True


# --- files ----------------------------------------------------------------


def annotation(identifier, image_id, index, label, mask):
    """One digit in COCO's format: mask, area and box of what is visible."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    rle['counts'] = rle['counts'].decode()
    ys, xs = np.nonzero(mask)
    return dict(
        id=identifier,
        image_id=image_id,
        category_id=label + 1,
        iscrowd=0,
        area=int(mask.sum()),
        bbox=[
            int(xs.min()),
            int(ys.min()),
            int(xs.max() - xs.min() + 1),
            int(ys.max() - ys.min() + 1),
        ],
        segmentation=rle,
        digit=index,
    )


def measure_spread(means, variances) -> dict:
    """How the images' channel means and deviations vary, on the 0-255 scale.

    ``between_images`` is the share of the variance of all pixels that the
    images' own means explain, from 0 (images with equal means) to 1.
    """
    means, variances = np.array(means), np.array(variances)
    deviations = np.sqrt(variances)
    between_images = means.var(0) / (means.var(0) + variances.mean(0))
    return dict(
        mean=means.mean(0).round(2).tolist(),
        std_of_means=means.std(0).round(2).tolist(),
        std=deviations.mean(0).round(2).tolist(),
        std_of_stds=deviations.std(0).round(2).tolist(),
        between_images=float(between_images.mean().round(4)),
    )


def write_split(out, split, count, glyphs, args, console) -> dict:
    """Images and labels of one split; what was measured."""
    folders = {
        kind: osp.join(out, kind, split, 'scenes')
        for kind in ('leftImg8bit', 'gtFine')
    }
    for folder in folders.values():
        os.makedirs(folder)
    images, annotations, means, variances = [], [], [], []
    for number in track(
        range(count), f'{split:>5} images', console=console, transient=True
    ):
        rng = np.random.default_rng([args.seed, SPLITS.index(split), number])
        pixels, digits = make_scene(rng, glyphs, args.image_size, args.spread)
        name = f'scenes_{number:06d}_{number:06d}'
        labels = np.zeros(pixels.shape[:2], np.uint8)
        for index, label, mask in digits:
            labels[mask] = label + 1
            annotations.append(
                annotation(len(annotations) + 1, number, index, label, mask)
            )
        for kind, suffix, array in (
            ('leftImg8bit', 'leftImg8bit', pixels[..., ::-1]),
            ('gtFine', 'gtFine_labelTrainIds', labels),
        ):
            path = osp.join(folders[kind], f'{name}_{suffix}.png')
            if not cv2.imwrite(path, array):
                sys.exit(f'error: cannot write {path}: is the disk full?')
        images.append(
            dict(
                id=number,
                file_name=f'scenes/{name}_leftImg8bit.png',
                width=args.image_size,
                height=args.image_size,
            )
        )
        means.append(pixels.mean((0, 1)))
        variances.append(pixels.var((0, 1)))
    coco = dict(
        info=dict(description='Digit scenes', version=str(VERSION)),
        licenses=[],
        images=images,
        annotations=annotations,
        categories=[
            dict(id=i + 1, name=name, supercategory='digit')
            for i, name in enumerate(CLASSES)
        ],
    )
    with open(
        osp.join(out, 'annotations', f'instances_{split}.json'), 'w'
    ) as f:
        json.dump(coco, f)
    return dict(
        images=count,
        digits=len(annotations),
        **measure_spread(means, variances),
    )


def arguments(args) -> dict:
    return dict(
        name=NAME,
        version=VERSION,
        num_train=args.num_train,
        num_val=args.num_val,
        image_size=args.image_size,
        seed=args.seed,
        spread=args.spread,
    )


def check_target(args) -> bool:
    """Whether there is something to do; leaves if it would do damage."""
    out = args.out
    if not osp.lexists(out) or (osp.isdir(out) and not os.listdir(out)):
        return True
    try:
        with open(osp.join(out, MANIFEST)) as f:
            found = json.load(f)['arguments']
        ours = found['name'] == NAME
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        sys.exit(
            f'error: {out} exists and holds no digit scenes. Give another '
            '--out; nothing was changed.'
        )
    if found == arguments(args):
        return False
    if not args.overwrite:
        differing = ', '.join(
            f'{key} {found.get(key)} (asked for {value})'
            for key, value in arguments(args).items()
            if found.get(key) != value
        )
        sys.exit(
            f'error: {out} holds digit scenes made with {differing}. Give '
            'another --out, or --overwrite to replace them.'
        )
    return True


def report(console, out, splits):
    table = Table(title=f'Digit scenes in {out}')
    for column in (
        'split',
        'images',
        'digits',
        'mean of channels',
        'its std over images',
        'variance between images',
    ):
        table.add_column(column, justify='right')
    for split, values in splits.items():
        table.add_row(
            split,
            str(values['images']),
            str(values['digits']),
            ' '.join(f'{v:.0f}' for v in values['mean']),
            ' '.join(f'{v:.0f}' for v in values['std_of_means']),
            f'{100 * values["between_images"]:.0f} %',
        )
    console.print(table)


def main(args=None):
    args = parse_args(args)
    console = Console()
    args.out = osp.normpath(args.out)
    if not check_target(args):
        console.print(f'{args.out} is complete already.')
        return
    # All is written beside the target and renamed as the last step: what is
    # there under its own name is complete.
    unfinished = f'{args.out}.unfinished'
    if osp.lexists(unfinished):
        if not osp.exists(osp.join(unfinished, MARKER)):
            sys.exit(
                f'error: {unfinished} is in the way and was not made by '
                'this tool. Move it, or give another --out.'
            )
        shutil.rmtree(unfinished)
    try:
        os.makedirs(unfinished)
        open(osp.join(unfinished, MARKER), 'w').close()
        os.makedirs(osp.join(unfinished, 'annotations'))
        glyphs = load_glyphs(args.seed)
        splits = {
            split: write_split(
                unfinished, split, count, glyphs[split], args, console
            )
            for split, count in zip(SPLITS, (args.num_train, args.num_val))
        }
        with open(osp.join(unfinished, MANIFEST), 'w') as f:
            manifest = dict(arguments=arguments(args), splits=splits)
            json.dump(manifest, f, indent=2)
        os.remove(osp.join(unfinished, MARKER))
        if osp.isdir(args.out):
            shutil.rmtree(args.out)
        os.rename(unfinished, args.out)
    except OSError as error:
        sys.exit(f'error: cannot write {args.out}: {error}')
    report(console, args.out, splits)


if __name__ == '__main__':
    main()
