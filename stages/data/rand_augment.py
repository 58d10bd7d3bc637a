"""RandAugment (Cubuk et al. 2019) on the device, with timm's "rand-m9-mstd0.5-inc1" semantics.

Two operations per image (with replacement) out of fifteen, each applied with probability 0.5, at a
magnitude drawn from N(m, 0.5) on a scale of 0 to 10 that grows in strength for every operation ("inc1").
Geometric operations resample bicubically with the mean colour outside; pixel operations act on 8-bit
levels, as Pillow's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

LUMA = (0.299, 0.587, 0.114)
DRAWS_PER_OPERATION = 5  # which, whether, magnitude (two for Box-Muller), sign

Image = torch.Tensor  # float32 (n, 3, H, W) in [0, 1]
Level = torch.Tensor  # float32 (n, 1, 1, 1)


def rand_augment(
    x_BCHW: torch.Tensor,
    draws_BN: np.ndarray,
    *,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    operations: int = 2,
    probability: float = 0.5,
    fill: Sequence[float] = (0.485, 0.456, 0.406),
) -> torch.Tensor:
    """Augment float32 images in [0, 1]; `draws_BN` has `operations` x DRAWS_PER_OPERATION columns.

    Samples that drew the same operation are computed together, so the cost is that of fifteen small
    batches, not of fifteen times the batch.
    """
    device = x_BCHW.device
    fill_C = torch.tensor(fill, dtype=x_BCHW.dtype, device=device)
    names = list(OPERATIONS)
    for k in range(operations):
        which, whether, u, v, sign = draws_BN[:, k * DRAWS_PER_OPERATION : (k + 1) * DRAWS_PER_OPERATION].T
        normal = np.sqrt(-2 * np.log(np.maximum(1 - u, 1e-12))) * np.cos(2 * np.pi * v)
        strength = np.clip(magnitude + magnitude_std * normal, 0, 10) / 10
        signed = np.where(sign < 0.5, -strength, strength)
        chosen = np.where(whether < probability, (which * len(names)).astype(int), -1)
        result = x_BCHW.clone()
        for index, name in enumerate(names):
            rows = np.flatnonzero(chosen == index)
            if len(rows):
                at = torch.from_numpy(rows).to(device)
                operation, is_signed = OPERATIONS[name]
                level = torch.from_numpy((signed if is_signed else strength)[rows]).to(device, x_BCHW.dtype)
                result[at] = operation(x_BCHW[at], level.view(-1, 1, 1, 1), fill_C)
        x_BCHW = result
    return x_BCHW


def affine(x: Image, matrix_n23: torch.Tensor, fill_C: torch.Tensor) -> Image:
    """Resample bicubically: output pixel (x, y), from the image's centre, takes input pixel A (x, y) + t.

    `matrix_n23` is [A | t] in pixels. Outside lies `fill_C`.
    """
    n, _, H, W = x.shape
    # affine_grid works in units of half a side: rescale the mixed terms and the translation.
    scale = torch.tensor([[1, H / W, 2 / W], [W / H, 1, 2 / H]], dtype=x.dtype, device=x.device)
    grid = functional.affine_grid(matrix_n23 * scale, [n, 3, H, W], align_corners=False)
    # Resampling x - fill with zeros outside puts the fill colour outside, blended at the border.
    fill = fill_C.view(1, 3, 1, 1)
    moved = functional.grid_sample(x - fill, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (moved + fill).clamp(0, 1)


def _matrix(rows: Sequence[Sequence[torch.Tensor | float]], like: Level) -> torch.Tensor:
    ones = torch.ones_like(like.flatten())
    return torch.stack([torch.stack([ones * entry for entry in row], 1) for row in rows], 1)


def _rotate(x: Image, level: Level, fill: torch.Tensor) -> Image:
    angle = -level.flatten() * math.radians(30)  # Pillow turns counter-clockwise, y points down
    cos, sin = torch.cos(angle), torch.sin(angle)
    return affine(x, _matrix([[cos, sin, 0.0], [-sin, cos, 0.0]], level), fill)


def _shear_x(x: Image, level: Level, fill: torch.Tensor) -> Image:
    # Pillow shears about the corner; about the centre that is a translation by half of it besides.
    factor = level.flatten() * 0.3
    return affine(x, _matrix([[1.0, factor, factor * x.shape[2] / 2], [0.0, 1.0, 0.0]], level), fill)


def _shear_y(x: Image, level: Level, fill: torch.Tensor) -> Image:
    factor = level.flatten() * 0.3
    return affine(x, _matrix([[1.0, 0.0, 0.0], [factor, 1.0, factor * x.shape[3] / 2]], level), fill)


def _translate_x(x: Image, level: Level, fill: torch.Tensor) -> Image:
    return affine(x, _matrix([[1.0, 0.0, level.flatten() * 0.45 * x.shape[3]], [0.0, 1.0, 0.0]], level), fill)


def _translate_y(x: Image, level: Level, fill: torch.Tensor) -> Image:
    return affine(x, _matrix([[1.0, 0.0, 0.0], [0.0, 1.0, level.flatten() * 0.45 * x.shape[2]]], level), fill)


def grey(x: Image) -> Image:
    """ITU-R 601-2 luma, (n, 1, H, W)."""
    return (x * torch.tensor(LUMA, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _levels(x: Image) -> torch.Tensor:
    """int64 0…255, as Pillow would hold the pixels."""
    return (x * 255).round().clamp(0, 255).to(torch.int64)


def auto_contrast(x: Image, level: Level, fill: torch.Tensor) -> Image:
    """Stretch each channel to the full range (Pillow's ImageOps.autocontrast)."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (x - low) / spread.clamp_min(1e-6), x).clamp(0, 1)


def equalize(x: Image, level: Level, fill: torch.Tensor) -> Image:
    """Flatten each channel's histogram (Pillow's ImageOps.equalize)."""
    n, _, H, W = x.shape
    values = _levels(x).reshape(n * 3, H * W)
    histogram = torch.zeros(n * 3, 256, dtype=torch.int64, device=x.device)
    histogram.scatter_add_(1, values, torch.ones_like(values))
    last = histogram.gather(1, values.amax(1, keepdim=True))
    step = (H * W - last) // 255
    before = torch.cumsum(histogram, 1) - histogram
    table = ((before + step // 2) // step.clamp_min(1)).clamp(0, 255)
    identity = torch.arange(256, device=x.device).expand_as(table)
    single = (histogram > 0).sum(1, keepdim=True) <= 1
    table = torch.where((step == 0) | single, identity, table)
    return table.gather(1, values).view(n, 3, H, W).to(x.dtype) / 255


def invert(x: Image, level: Level, fill: torch.Tensor) -> Image:
    """Negative."""
    return 1 - x


def posterize(x: Image, level: Level, fill: torch.Tensor) -> Image:
    """Keep 4 bits down to 0 as the level grows (timm's PosterizeIncreasing)."""
    bits = 4 - (level * 4).to(torch.int64)
    kept = _levels(x) >> (8 - bits) << (8 - bits)
    return kept.to(x.dtype) / 255


def solarize(x: Image, level: Level, fill: torch.Tensor) -> Image:
    """Invert the pixels at or above a threshold that falls from 256 to 0 (SolarizeIncreasing)."""
    threshold = 256 - (level * 256).to(torch.int64)
    return torch.where(_levels(x) >= threshold, 1 - x, x)


def solarize_add(x: Image, level: Level, fill: torch.Tensor) -> Image:
    """Add up to 110 levels to pixels below 128."""
    values = _levels(x)
    brighter = (values + (level * 110).to(torch.int64)).clamp_max(255).to(x.dtype) / 255
    return torch.where(values < 128, brighter, x)


def blend(x: Image, other: torch.Tensor, level: Level) -> Image:
    """Pillow's ImageEnhance with factor max(0.1, 1 + 0.9 level), level in [-1, 1] (timm's "Increasing")."""
    factor = (1 + 0.9 * level).clamp_min(0.1)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _colour(x: Image, level: Level, fill: torch.Tensor) -> Image:
    return blend(x, grey(x), level)


def _contrast(x: Image, level: Level, fill: torch.Tensor) -> Image:
    return blend(x, grey(x).mean((2, 3), keepdim=True), level)


def _brightness(x: Image, level: Level, fill: torch.Tensor) -> Image:
    return blend(x, torch.zeros_like(x), level)


def _sharpness(x: Image, level: Level, fill: torch.Tensor) -> Image:
    # Pillow's SMOOTH filter; it leaves the outermost pixels as they are.
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=x.dtype, device=x.device) / 13
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = functional.conv2d(x, kernel.expand(3, 1, 3, 3), groups=3)
    return blend(x, smooth, level)


# name -> (function, whether the level has a sign). The order is part of every run's randomness.
OPERATIONS: dict[str, tuple[Callable[[Image, Level, torch.Tensor], Image], bool]] = {
    "auto_contrast": (auto_contrast, False),
    "equalize": (equalize, False),
    "invert": (invert, False),
    "rotate": (_rotate, True),
    "posterize": (posterize, False),
    "solarize": (solarize, False),
    "solarize_add": (solarize_add, False),
    "colour": (_colour, True),
    "contrast": (_contrast, True),
    "brightness": (_brightness, True),
    "sharpness": (_sharpness, True),
    "shear_x": (_shear_x, True),
    "shear_y": (_shear_y, True),
    "translate_x": (_translate_x, True),
    "translate_y": (_translate_y, True),
}
