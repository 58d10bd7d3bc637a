"""Which images go into which shard: a seeded permutation, cut into pieces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from cluster import storage
from stages.data.rng import Purpose, permutation
from stages.shard.config import ShardConfig
from stages.shard.index import SourceIndex
from stages.shard.listing import PARQUET
from stages.shard.read import Samples
from stages.shard.source import Source
from stages.shard.ustar import fits

_TAR_OVERHEAD = 2048  # headers and padding of an image and its label, on average


@dataclass(frozen=True)
class PlannedShard:
    """One shard to be: `rows` of the index's table in the order in which they are written."""

    split: str
    name: str
    rows: np.ndarray


def plan_shards(index: SourceIndex, source: Source, config: ShardConfig) -> list[PlannedShard]:
    """Cut every split's permuted samples into shards of nearly equal count (or of bounded bytes)."""
    planned = []
    by_group = any(unit["kind"] == PARQUET for unit in source.units)
    for split, samples in index.splits.items():
        tag = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "little")
        order = permutation(len(samples), config.seed, int(Purpose.SHARD_ASSIGNMENT), tag)
        if by_group:
            order = _in_blocks(index, samples.rows, order, config.parquet_blocks)
        rows = samples.rows[order]
        if config.shard_bytes is None:
            pieces = np.array_split(rows, -(-len(rows) // config.shard_samples))
        else:
            ends = np.cumsum(np.asarray(index.table.size)[rows] + _TAR_OVERHEAD)
            pieces = np.array_split(
                rows, np.searchsorted(ends, np.arange(config.shard_bytes, ends[-1], config.shard_bytes))
            )
            pieces = [piece for piece in pieces if len(piece)]
        planned += [PlannedShard(split, f"{split}-{i:06d}", piece) for i, piece in enumerate(pieces)]
    return planned


def _in_blocks(index: SourceIndex, rows: np.ndarray, order: np.ndarray, given: int | None) -> np.ndarray:
    """The permutation with the rows of each block of a row group together, blocks where their first row was.

    A row group is cut at random into blocks (`given`, or as many as its labels call for), so a shard that takes
    whole blocks reads few row groups.
    """
    group = np.zeros(len(rows), np.int64)
    if index.table.aux is not None:
        group = np.asarray(index.table.aux)[rows].astype(np.int64)
    container = np.asarray(index.table.container)[rows].astype(np.int64)
    _, ids = np.unique((container << 32) | group, return_inverse=True)
    blocks = _blocks(ids, index.labels[rows]) if given is None else np.full(ids.max() + 1, given)
    permuted = ids[order]
    by_group = np.argsort(permuted, kind="stable")
    begins = np.flatnonzero(np.diff(permuted[by_group], prepend=-1))
    counts = np.diff(begins, append=len(rows))
    rank = np.empty(len(rows), np.int64)
    rank[by_group] = np.arange(len(rows)) - np.repeat(begins, counts)
    block = permuted * blocks.max() + rank * blocks[permuted] // counts[permuted]
    _, first, inverse = np.unique(block, return_index=True, return_inverse=True)
    return order[np.argsort(first[inverse], kind="stable")]


def _blocks(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 blocks per row group: how many times fewer classes it holds than as many rows drawn at random would.

    One for a group of shuffled rows (of at least half of the classes expected), one for each row, nearly, when
    a group holds a single class of many.
    """
    rows = np.bincount(ids)
    classes, numbers = np.unique(labels, return_inverse=True)
    held = np.bincount(np.unique(ids.astype(np.int64) * len(classes) + numbers) // len(classes))
    expected = len(classes) * -np.expm1(rows * np.log1p(-1 / max(len(classes), 2)))
    return np.where(2 * held >= expected, 1, np.minimum(rows, np.ceil(expected / held))).astype(np.int64)


def samples_of(index: SourceIndex, shard: PlannedShard) -> Samples:
    """What the shard's writer needs of its images."""
    table, rows = index.table, shard.rows
    paths = index.paths(rows)
    return Samples(
        paths=paths,
        # A name too long for ustar is replaced by its hash; the label and the order stay.
        keys=[
            key if fits(f"{key}.jpg") else hashlib.sha256(key.encode()).hexdigest()[:32]
            for key in index.keys(shard.split, rows, paths)
        ],
        container=np.asarray(table.container)[rows].tolist(),
        offset=np.asarray(table.offset)[rows].tolist(),
        size=np.asarray(table.size)[rows].tolist(),
        aux=[0] * len(rows) if table.aux is None else np.asarray(table.aux)[rows].tolist(),
        label=index.labels[rows].tolist(),
    )


def plan_fingerprint(config: ShardConfig, index: SourceIndex) -> str:
    """sha256 over what decides the shards' bytes: the config's identity and the source's content."""
    return hashlib.sha256(
        storage.canonical_json({"config": config.identity(), "source": index.fingerprint})
    ).hexdigest()
