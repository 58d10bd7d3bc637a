"""Where to cut: the random-resized crop as a function of numbers, and boxes of the eval crop."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from stages.data.rng import Purpose, uniform_table

ATTEMPTS = 10
_DRAWS = 2 * ATTEMPTS + 2


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_draws(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """float64 (B, 22) in [0, 1): the numbers that `random_resized_crop` takes for each sample."""
    return uniform_table(_DRAWS, seed, epoch, int(Purpose.CROP), sample_ids)


def random_resized_crop(
    height: int, width: int, draws: np.ndarray, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The crop of Szegedy et al. (2015, §6) as torchvision's and timm's RandomResizedCrop take it.

    Ten attempts at a rectangle of a random share `scale` of the area and a log-uniform aspect `ratio`
    (width / height); the first that fits lies anywhere in the image. If none fits, the largest centred
    rectangle within the aspect limits. `draws` is one row of `crop_draws`.
    """
    numbers = draws.tolist()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(ATTEMPTS):
        area = height * width * (scale[0] + numbers[2 * attempt] * (scale[1] - scale[0]))
        aspect = math.exp(low + numbers[2 * attempt + 1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(numbers[-2] * (height - h + 1))
            left = int(numbers[-1] * (width - w + 1))
            return Box(top, left, h, w)
    h, w = height, width
    if width < ratio[0] * height:
        h = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = max(1, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def eval_sizes(height: int, width: int, size: int, crop_pct: float) -> tuple[int, int, Box]:
    """The usual eval crop: resize the short side to size / crop_pct, then take the centre.

    Returns the resized height and width and the central box of `size` pixels in it.
    """
    short = math.floor(size / crop_pct)
    if height <= width:
        new_height, new_width = short, max(short, int(short * width / height))
    else:
        new_height, new_width = max(short, int(short * height / width)), short
    return (
        new_height,
        new_width,
        Box(round((new_height - size) / 2), round((new_width - size) / 2), size, size),
    )
