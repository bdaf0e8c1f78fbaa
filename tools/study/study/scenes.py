"""Handwritten digits in procedural scenes, for classification.

The digits are real: the 1,797 of scikit-learn's ``load_digits`` (8x8, from
UCI's Optical Recognition of Handwritten Digits), split once, by writing, into
training, validation and test digits. Each scene is one digit, rotated,
scaled and moved, tinted, on a tinted and textured background, under a light
that has a direction, a strength and a level of its own. So
scenes differ from one another as photographs do; :func:`spread` says by how
much.
"""

import math
from functools import lru_cache
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = dict(train=(0, 1000), val=(1000, 1300), test=(1300, 1797))


@lru_cache
def _digits() -> Tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(data.images, dtype=torch.float32) / 16
    return images[order], torch.as_tensor(data.target)[order]


def scenes(
    split: str, count: int, seed: int, size: int = 16, variation: float = 1.0
) -> Tuple[Tensor, Tensor]:
    """Random scenes and their labels.

    Args:
        split (str): ``'train'``, ``'val'`` or ``'test'``: which digits.
        count (int): Number of scenes.
        seed (int): Of the random numbers.
        size (int): Height and width. Default: 16
        variation (float): How much illumination, contrast and colour differ
            from scene to scene; 0 for the same in all. Default: 1

    Returns:
        tuple[Tensor, Tensor]: Scenes (count, 3, size, size), in about [-2, 2],
        and labels (count,).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.empty(count, *shape).uniform_(
            low, high, generator=generator
        )

    first, last = SPLITS[split]
    images, labels = _digits()
    index = torch.randint(first, last, (count,), generator=generator)

    # The digit: rotated, scaled, moved.
    angle = uniform(-0.3, 0.3)
    scale = uniform(0.7, 0.95)
    room = 1 - scale
    theta = torch.stack(
        [
            torch.stack([angle.cos(), -angle.sin()], 1) / scale[:, None],
            torch.stack([angle.sin(), angle.cos()], 1) / scale[:, None],
        ],
        1,
    )
    shift = 0.5 * uniform(-1, 1, 2) * room[:, None]
    offset = -(theta @ shift[..., None])
    grid = F.affine_grid(
        torch.cat([theta, offset], 2),
        (count, 1, size, size),
        align_corners=False,
    )
    mask = F.grid_sample(images[index][:, None], grid, align_corners=False)

    # The digit is lighter than its background, each with a tint.
    background = 0.5 * uniform(-1, 1, 3, 1, 1)
    tint = 1 + 0.5 * uniform(-1, 1, 3, 1, 1)
    contrast = 1.2 * (uniform(-0.8, 0.8, 1, 1, 1) * variation).exp()
    texture = F.interpolate(
        uniform(-1, 1, 3, size // 4, size // 4), size, mode='bilinear'
    )
    noise = torch.randn(count, 3, size, size, generator=generator)
    strength = uniform(0.05, 0.3, 1, 1, 1) * contrast
    scene = background + contrast * tint * mask
    scene = scene + strength * (texture + 0.4 * noise)

    # Light: a gradient across the scene, an exposure and an offset.
    where = torch.linspace(-1, 1, size)
    turn = uniform(0, 2 * math.pi, 1, 1, 1)
    ramp = turn.cos() * where[:, None] + turn.sin() * where
    gradient = 1 + uniform(0, 0.7, 1, 1, 1) * variation * ramp
    exposure = (uniform(-0.5, 0.5, 1, 1, 1) * variation).exp()
    level = uniform(-1, 1, 1, 1, 1) * variation
    return scene * gradient * exposure + level, labels[index]


def spread(images: Tensor) -> dict:
    """How much images differ: what normalization over few of them feels.

    Returns:
        dict: ``level``, the standard deviation over images of an image's mean
        divided by the standard deviation of all pixels; ``contrast``, the
        coefficient of variation over images of an image's own standard
        deviation.
    """
    flat = images.flatten(1)
    own = flat.std(1)
    return dict(
        level=float(flat.mean(1).std() / flat.std()),
        contrast=float(own.std() / own.mean()),
    )
