"""What the shard stage reads and how it cuts it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.config import Config, not_identity
from stages.data.decode import MAX_FILE_BYTES, MAX_PIXELS


class ShardConfig(Config):
    """One data set to shard.

    The identity is the name and everything that decides the bytes of the shards; where the source lies is
    not part of it, so the same archive read from a disk or from a bucket gives the same data set.
    """

    name: str
    source: str = not_identity()  # path or URI of an ImageFolder tree, or of a tar or zip of one
    splits: tuple[str, ...] = ("train", "val")  # top-level folders; without any, all images are of the first
    seed: int = 0  # of the global permutation that assigns images to shards
    shard_samples: int = Field(default=1000, ge=1)  # at most this many images per shard …
    shard_bytes: int | None = Field(default=None, ge=2**16)  # … or, when set, about this many bytes instead
    verify: Literal["header", "decode"] = "header"  # what is checked of every image
    max_bad_fraction: float = Field(
        default=0.001, ge=0, le=1
    )  # more broken images than this: the source is invalid
    max_file_bytes: int = Field(default=MAX_FILE_BYTES, ge=1)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
