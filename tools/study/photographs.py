"""How much do photographs differ from one another?

    python tools/study/photographs.py [FOLDER]

Prints what ``digit_scenes.py`` prints of its scenes: the share of the pixel
variance that lies between images, from 0 (all have the same mean colour) to
1. Without a folder, of the photographs that scikit-learn and scikit-image
bring (``pip install scikit-image``).
"""

import argparse
import glob
import os.path as osp
import sys

import cv2

ROOT = osp.join(osp.dirname(osp.abspath(__file__)), osp.pardir)
sys.path.insert(0, osp.join(ROOT, 'dataset_converters'))
from digit_scenes import measure_spread  # noqa: E402

# Those of scikit-image's that show a place or a thing in ordinary light.
PHOTOGRAPHS = (
    'astronaut.png',
    'camera.png',
    'chelsea.png',
    'clock_motion.png',
    'coffee.png',
    'coins.png',
    'motorcycle_left.png',
    'rocket.jpg',
)
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp')
SIDE = 256  # small images differ as much as large ones


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('folder', nargs='?', help='of images, at any depth')
    return parser.parse_args()


def find(folder):
    if folder is None:
        import sklearn.datasets

        images = osp.join(osp.dirname(sklearn.datasets.__file__), 'images')
        paths = sorted(glob.glob(osp.join(images, '*.jpg')))
        try:
            import skimage
        except ImportError:
            print('Without scikit-image there are only two photographs.')
            return paths
        data = osp.join(osp.dirname(skimage.__file__), 'data')
        return paths + [osp.join(data, name) for name in PHOTOGRAPHS]
    if not osp.isdir(folder):
        sys.exit(f'error: there is no folder {folder!r}')
    found = glob.glob(osp.join(folder, '**', '*'), recursive=True)
    paths = sorted(p for p in found if p.lower().endswith(EXTENSIONS))
    if len(paths) < 2:
        sys.exit(
            f'error: {folder!r} has {len(paths)} images '
            f'({", ".join(EXTENSIONS)}); at least 2 are needed'
        )
    return paths


def main():
    args = parse_args()
    means, variances = [], []
    for path in find(args.folder):
        image = cv2.imread(path, cv2.IMREAD_COLOR)
        if image is None:
            print(f'{path} cannot be read and is left out.')
            continue
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        mean, deviation = cv2.meanStdDev(image)
        means.append(mean.ravel())
        variances.append(deviation.ravel() ** 2)
    if len(means) < 2:
        sys.exit('error: fewer than two images could be read')
    found = measure_spread(means, variances)
    print(
        f'{len(means)} images: {found["between_images"]:.2f} of the variance '
        f'lies between images; standard deviations of the channels of an '
        f'image {found["std"]}, of their means over images '
        f'{found["std_of_means"]} (BGR, 0-255)'
    )


if __name__ == '__main__':
    main()
