"""What the shard stage reads and how it cuts it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.config import Config, not_identity
from stages.data.decode import MAX_FILE_BYTES, MAX_PIXELS


class ShardConfig(Config):
    """One data set to shard.

    The identity is the name and everything that decides the bytes of the shards; where the source lies is
    not part of it, so the same archive read from a disk or from a bucket gives the same data set.
    """

    name: str
    source: str = not_identity()  # path or URI; stages/shard/source.py lists the layouts that are known
    val_labels: str | None = not_identity(
        None
    )  # labels of ILSVRC2012_img_val.tar; by default looked for beside
    splits: tuple[str, ...] = ("train", "val")  # names in the source; what bears none is of the first
    seed: int = 0  # of the global permutation that assigns images to shards
    shard_samples: int = Field(default=1000, ge=1)  # at most this many images per shard …
    shard_bytes: int | None = Field(default=None, ge=2**16)  # … or, when set, about this many bytes instead
    # Parquet is read in whole row groups. Each is cut into blocks, which the permutation spreads over the shards:
    # more blocks mix sorted rows better, and each row group is read that many times. None: as many as its labels
    # call for (stages/shard/plan.py); 1: read once, whatever the shards then hold.
    parquet_blocks: int | None = Field(default=None, ge=1)
    verify: Literal["header", "decode"] = "header"  # what is checked of every image
    max_bad_fraction: float = Field(
        default=0.001, ge=0, le=1
    )  # more broken images than this: the source is invalid
    # The defaults are what readers of the shards take, too: a higher cap would keep images that nobody can read.
    max_file_bytes: int = Field(default=MAX_FILE_BYTES, ge=1, le=MAX_FILE_BYTES)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MAX_PIXELS)
    max_side: int | None = Field(default=None, ge=16)  # images with a longer side are shrunk to it, as JPEG …
    quality: int | None = Field(default=None, ge=1, le=100)  # … of this quality (92)

    @model_validator(mode="after")
    def _quality_needs_max_side(self) -> Self:
        if self.quality is not None and self.max_side is None:
            raise ValueError("quality is that of images shrunk to max_side: set max_side too")
        return self
