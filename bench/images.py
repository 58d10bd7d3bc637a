"""JPEGs that cost what ImageNet's cost: sizes, spectrum and bytes per pixel like its photographs'.

ImageNet's training images are about 500 x 375 pixels and 110 KB. Noise with a 1/f amplitude spectrum (which
natural images share: Field 1987) over flat patches with hard edges gives the entropy decoder, the inverse
transform and the resizer the same work as photographs do, without shipping any.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((375, 500), (375, 500), (500, 375), (333, 500), (375, 500), (400, 500), (480, 640), (375, 500))


def photograph(seed: int) -> Image.Image:
    """A seeded picture of one of `SIZES`."""
    rng = np.random.default_rng(seed)
    height, width = SIZES[seed % len(SIZES)]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        phase = rng.uniform(0, 2 * np.pi, frequency.shape)
        planes.append(np.fft.irfft2(np.exp(1j * phase) / frequency, (height, width)))
    texture = np.stack(planes, 2)
    texture = texture / texture.std()
    texture = 0.75 * texture[..., :1] + 0.25 * texture  # most of a photograph's variation is in brightness
    patches = Image.fromarray(rng.integers(60, 196, (6, 8, 3), dtype=np.uint8))
    flat = np.asarray(patches.resize((width, height), Image.Resampling.NEAREST), np.float64)
    return Image.fromarray((flat + 34 * texture).clip(0, 255).astype(np.uint8))


def write_folder(root: Path, count: int, *, classes: int = 10, quality: int = 91) -> Path:
    """An ImageFolder of `count` JPEGs (every image is made once per 64 and reused); returns `root`."""
    distinct = []
    for seed in range(min(count, 64)):
        buffer = io.BytesIO()
        photograph(seed).save(buffer, "JPEG", quality=quality)
        distinct.append(buffer.getvalue())
    for index in range(count):
        folder = root / "train" / f"class_{index % classes:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:07d}.jpg").write_bytes(distinct[index % len(distinct)])
    return root
