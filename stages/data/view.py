"""One uint8 view of a fixed size from image bytes: probe, choose the crop, decode, resize.

Resizing is bicubic with antialiasing (Catmull-Rom, a = -0.5, as Pillow's BICUBIC) by torch's uint8
kernel on channels-last pixels, which equals Pillow's within rounding at several times its speed.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from stages.config import Config
from stages.data.crop import Box, crop_draws, eval_sizes, random_resized_crop
from stages.data.decode import Header, decode, probe
from stages.data.region import decode_region


class TrainView(Config):
    """The random-resized crop of training."""

    kind: Literal["train"] = "train"
    size: int = Field(default=224, ge=8)
    min_scale: float = Field(default=0.2, gt=0, le=1)  # of the image's area
    max_scale: float = Field(default=1.0, gt=0, le=1)
    min_ratio: float = Field(default=3 / 4, gt=0)  # width / height
    max_ratio: float = Field(default=4 / 3, gt=0)
    # libjpeg may decode at 1/2, 1/4 or 1/8 when the crop then still has this many times the view's side.
    scaled_decode: float = Field(default=1.0, ge=1)

    def draws(self, seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
        """One row of random numbers per sample, for `render`."""
        return crop_draws(seed, epoch, sample_ids)

    def render(self, data: bytes, draws: np.ndarray) -> torch.Tensor:
        """uint8 (size, size, 3) RGB; raises BadImage."""
        header = probe(data)
        box = random_resized_crop(
            header.height,
            header.width,
            draws,
            scale=(self.min_scale, self.max_scale),
            ratio=(self.min_ratio, self.max_ratio),
        )
        pixels = decode_crop(data, header, box, min_side=math.ceil(self.size * self.scaled_decode))
        return resize(pixels, self.size, self.size)


class EvalView(Config):
    """The deterministic central crop of evaluation, always from the fully decoded image."""

    kind: Literal["eval"] = "eval"
    size: int = Field(default=224, ge=8)
    crop_pct: float = Field(default=0.875, gt=0, le=1)

    def draws(self, seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
        """Nothing is random here: (B, 0)."""
        del seed, epoch
        return np.empty((len(sample_ids), 0))

    def render(self, data: bytes, draws: np.ndarray) -> torch.Tensor:
        """uint8 (size, size, 3) RGB; raises BadImage."""
        del draws
        pixels = decode(data, probe(data))
        height, width, box = eval_sizes(pixels.shape[0], pixels.shape[1], self.size, self.crop_pct)
        return resize(pixels, height, width)[box.top : box.top + box.height, box.left : box.left + box.width]


def decode_crop(data: bytes, header: Header, box: Box, *, min_side: int) -> np.ndarray:
    """uint8 (h, w, 3): the box's pixels, at 1/2, 1/4 or 1/8 of their size where both sides stay >= `min_side`.

    Raises BadImage.
    """
    if min(box.height, box.width) >= 2 * min_side:
        pixels = decode(
            data,
            header,
            min_height=math.ceil(header.height * min_side / box.height),
            min_width=math.ceil(header.width * min_side / box.width),
        )
        box = _scaled(box, header.height, header.width, pixels)
    else:
        region = None
        # A file without its end marker is decoded whole, so that its being cut short is noticed.
        if header.turbo and header.orientation == 1 and b"\xff\xd9" in data[-64:]:
            region = decode_region(data, box)
        if region is not None:
            return region
        pixels = decode(data, header)
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def resize(pixels_HWC: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Bicubic, antialiased: uint8 (H, W, 3) → uint8 (height, width, 3)."""
    if pixels_HWC.shape[:2] == (height, width):
        return torch.from_numpy(np.ascontiguousarray(pixels_HWC))
    # The batch axis comes first: added after the permutation it would get a stride that torch does not take
    # for channels-last, and its kernel would repack the pixels twice (0.22 ms instead of 0.14 for 224 x 224).
    image_BCHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC))[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(image_BCHW, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0)


def _scaled(box: Box, height: int, width: int, pixels: np.ndarray) -> Box:
    """The box in a picture that may have been decoded at a fraction of (height, width)."""
    if pixels.shape[:2] == (height, width):
        return box
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    top, left = round(box.top * down), round(box.left * across)
    bottom, right = round((box.top + box.height) * down), round((box.left + box.width) * across)
    return Box(top, left, max(1, bottom - top), max(1, right - left))
