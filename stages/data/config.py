"""What a training or evaluation stage reads, and how."""

from __future__ import annotations

from pydantic import Field

from stages.config import Config, not_identity
from stages.data.view import EvalView, TrainView


class CacheConfig(Config):
    """Where copies of remote shards lie on this node. No field is part of a run's identity."""

    folder: str | None = not_identity(None)  # without one, remote samples are read by range requests
    max_bytes: int = not_identity(100 * 2**30, ge=2**20)


class DataConfig(Config):
    """Reading for training: the view, the order of samples, and what may vary from machine to machine."""

    view: TrainView = TrainView()
    streams: int = Field(default=64, ge=1)  # see stages/data/order.py; the world size must divide it
    window: int = Field(default=8, ge=1)  # shard pieces shuffled together inside a stream
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)  # more undecodable samples than this: stop
    cache: CacheConfig = not_identity(CacheConfig())
    loader_workers: int = not_identity(0, ge=0)  # processes per rank; 0: one thread of the training process


class EvalDataConfig(Config):
    """Reading for evaluation: every sample once, in a fixed view."""

    view: EvalView = EvalView()
    batch_size: int = not_identity(64, ge=1)  # per rank
    cache: CacheConfig = not_identity(CacheConfig())
    loader_workers: int = not_identity(0, ge=0)
