"""Small real images and data sets, made on the spot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cluster.executor import LocalExecutor
from cluster.resources import Resources
from stages.artifacts import DatasetRef
from stages.context import StageContext
from stages.shard.config import ShardConfig
from stages.shard.stage import run


def picture(seed: int, *, height: int = 48, width: int = 64) -> Image.Image:
    """A smooth, seeded colour image (smooth, so that JPEG keeps it nearly as it is)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    """The image as JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def write_image_folder(
    root: Path, *, classes: int = 3, train: int = 10, val: int = 4, height: int = 48, width: int = 64
) -> Path:
    """An ImageFolder tree `root/{train,val}/class_<c>/img_<i>.jpg` with that many images per class."""
    for split, count in (("train", train), ("val", val)):
        for c in range(classes):
            folder = root / split / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                seed = (split == "val") * 100_000 + c * 1_000 + i
                (folder / f"img_{i}.jpg").write_bytes(jpeg(picture(seed, height=height, width=width)))
    return root


def shard_folder(source: Path, out: Path, **config: object) -> DatasetRef:
    """Run the shard stage in this process."""
    context = StageContext(out=str(out), executor=LocalExecutor(), resources=Resources(workers=1))
    artifact = run(ShardConfig(**{"name": "tiny", "source": str(source), **config}), {}, context).artifact
    assert isinstance(artifact, DatasetRef)
    return artifact
