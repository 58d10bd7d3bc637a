"""One split of a sharded data set: its index in memory, its samples by id.

Shards on this machine's file systems are read in place. Remote ones are copied whole into the node's
cache, or, without a cache, read by range requests.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.config import nearest
from stages.data.cache import ShardCache
from stages.data.config import CacheConfig
from stages.data.manifest import INDEX_SCHEMA, Manifest, Shard, load_manifest, resolve

_READERS = 16  # range requests in flight when there is no cache
_TRIES = 3  # reads of an answer that is shorter than asked for


class Sample(NamedTuple):
    """One sample as stored."""

    id: int
    key: str
    bytes: bytes
    label: int


class ShardDataset:
    """Random access to the samples of one split; open it with `ShardDataset.open`. Picklable.

    Attributes:
        shard_samples: samples of each shard, in id order.
        classes: class folder names in label order.
        fingerprint: of the whole data set's content.
        labels: int32 (samples,).
    """

    def __init__(self, manifest_uri: str, manifest: Manifest, split: str, cache: CacheConfig) -> None:
        stored = manifest.splits[split]
        self.split, self.fingerprint = split, manifest.fingerprint
        self.classes = [item.wnid for item in manifest.classes]
        self.num_classes = len(self.classes)
        self.shards: list[Shard] = stored.shards
        self.uris = [resolve(manifest_uri, manifest, shard.path) for shard in stored.shards]
        self.shard_samples = [shard.samples for shard in stored.shards]
        self._cache_config = cache
        self._cache: ShardCache | None = None
        uri = resolve(manifest_uri, manifest, stored.index.path)
        data = storage.read_bytes(uri)
        if storage.sha256_bytes(data) != stored.index.sha256:
            raise DataInvalid(
                f"the index {uri} is not the one its manifest names", remedy="shard the data again"
            )
        table = pq.read_table(io.BytesIO(data), schema=INDEX_SCHEMA)
        self._shard, self._offset, self._size, self.labels = (
            table[name].to_numpy() for name in ("shard", "offset", "size", "label")
        )
        self._keys = table["key"].combine_chunks()
        if np.bincount(self._shard, minlength=len(self.shards)).tolist() != self.shard_samples:
            raise DataInvalid(f"the index {uri} does not fit its manifest", remedy="shard the data again")

    @classmethod
    def open(cls, manifest_uri: str, split: str, cache: CacheConfig | None = None) -> Self:
        """Read manifest and index; raises DataInvalid when they are missing or broken, or the split is unknown."""
        manifest = load_manifest(manifest_uri)
        if split not in manifest.splits:
            raise DataInvalid(
                f"data set '{manifest.name}' has no split '{split}'",
                found=", ".join(manifest.splits),
                remedy=nearest(split, list(manifest.splits)),
            )
        return cls(manifest_uri, manifest, split, cache or CacheConfig())

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, sample_id: int) -> str:
        """The sample's key, `class/file`."""
        return self._keys[sample_id].as_py()

    def read(self, sample_ids: np.ndarray) -> list[Sample]:
        """The samples in the order asked for; each shard is opened once.

        Raises DataInvalid when a shard is missing or damaged.
        """
        ids = np.asarray(sample_ids)
        data: list[bytes] = [b""] * len(ids)
        remote_without_cache: list[int] = []
        for shard in np.unique(self._shard[ids]).tolist():
            positions = np.flatnonzero(self._shard[ids] == shard)
            path = self._local(shard)
            if path is None:
                remote_without_cache += positions.tolist()
                continue
            for position, content in zip(
                positions, self._read_local(shard, path, ids[positions]), strict=True
            ):
                data[position] = content
        if remote_without_cache:
            with ThreadPoolExecutor(_READERS) as pool:
                found = pool.map(self._read_range, ids[remote_without_cache].tolist())
                for at, content in zip(remote_without_cache, found, strict=True):
                    data[at] = content
        return [
            Sample(sample_id, self.key(sample_id), content, int(self.labels[sample_id]))
            for sample_id, content in zip(ids.tolist(), data, strict=True)
        ]

    @property
    def cached(self) -> bool:
        """Whether shards are remote and copied to a local cache."""
        return self._cache_config.folder is not None and any("://" in uri for uri in self.uris)

    @property
    def cache_bytes(self) -> int:
        """Capacity of the cache."""
        return self._cache_config.max_bytes

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache, if there is one and the shard is remote."""
        self._local(shard)

    def _local(self, shard: int) -> Path | None:
        uri = self.uris[shard]
        if "://" not in uri:
            return Path(uri)
        if self._cache_config.folder is None:
            return None
        if self._cache is None:
            self._cache = ShardCache(self._cache_config.folder, self._cache_config.max_bytes)
        return self._cache.ensure(uri, size=self.shards[shard].bytes, sha256=self.shards[shard].sha256)

    def _read_local(self, shard: int, path: Path, ids: np.ndarray) -> list[bytes]:
        for _ in range(10):
            try:
                file = os.open(path, os.O_RDONLY)
                break
            except FileNotFoundError:
                # Another process made room between our look and our open; fetch it again.
                again = self._local(shard)
                if again is None or "://" not in self.uris[shard]:
                    raise self._damaged(shard, "no such file") from None
        else:
            raise ConfigError(
                f"shards leave the cache {self._cache_config.folder} before they are read",
                remedy="raise cache.max_bytes, or lower data.streams or data.window",
            )
        try:
            content = [os.pread(file, int(self._size[i]), int(self._offset[i])) for i in ids.tolist()]
            if any(len(c) != self._size[i] for c, i in zip(content, ids.tolist(), strict=True)):
                raise self._damaged(shard, f"{os.fstat(file).st_size} bytes")
            return content
        finally:
            os.close(file)

    def _read_range(self, sample_id: int) -> bytes:
        shard, size = int(self._shard[sample_id]), int(self._size[sample_id])
        for _ in range(_TRIES):
            content = storage.read_range(self.uris[shard], int(self._offset[sample_id]), size)
            if len(content) == size:
                return content
        raise self._damaged(shard, f"{len(content)} of {size} bytes at {self._offset[sample_id]}")

    def _damaged(self, shard: int, found: str) -> DataInvalid:
        return DataInvalid(
            f"shard {self.uris[shard]} is damaged",
            expected=f"{self.shards[shard].bytes} bytes, sha256 {self.shards[shard].sha256[:16]}…",
            found=found,
            remedy="restore the file, or shard the data again into a new folder",
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": None}
