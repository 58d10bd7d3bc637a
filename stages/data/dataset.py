"""One split of a sharded data set: its index in memory, its samples by id.

Shards on this machine's file systems are read in place. Remote ones are copied whole into the node's
cache, or, without a cache, read by range requests.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.config import nearest
from stages.data.cache import ShardCache
from stages.data.config import CacheConfig
from stages.data.files import kept_open
from stages.data.manifest import INDEX_SCHEMA, Manifest, Shard, load_manifest, resolve

_READERS = 16  # range requests in flight when there is no cache
_OPENINGS = 10  # of a copy that others push out of the cache before it is open
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
        self._remote = "://" in self.uris[0]  # a data set lies in one place
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

    def read(self, sample_ids: np.ndarray) -> Iterator[Sample]:
        """The samples one by one in the order asked for, which holds one of them in memory at a time; range
        requests, where there is no cache, run ahead of it.

        Raises DataInvalid when a shard is missing or damaged, StorageUnavailable when the store does not answer.
        """
        ids = np.asarray(sample_ids).tolist()
        with ExitStack() as stack:
            if self._remote and not self.cached:
                pool = ThreadPoolExecutor(_READERS)
                stack.callback(pool.shutdown, cancel_futures=True)  # for those who stop midway
                contents: Iterator[bytes] = pool.map(self._read_range, ids)
            else:
                files = stack.enter_context(kept_open(self._open))
                contents = (self._read_local(files, sample_id) for sample_id in ids)
            for sample_id, content in zip(ids, contents, strict=True):
                yield Sample(sample_id, self.key(sample_id), content, int(self.labels[sample_id]))

    @property
    def cached(self) -> bool:
        """Whether shards are remote and copied to a local cache."""
        return self._remote and self._cache_config.folder is not None

    @property
    def cache_bytes(self) -> int:
        """Capacity of the cache."""
        return self._cache_config.max_bytes

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache, if it is remote and there is one."""
        if self.cached:
            self._local(shard)

    def _local(self, shard: int) -> Path:
        uri = self.uris[shard]
        if "://" not in uri:
            return Path(uri)
        if self._cache is None:
            assert self._cache_config.folder is not None
            self._cache = ShardCache(self._cache_config.folder, self._cache_config.max_bytes)
        return self._cache.ensure(uri, size=self.shards[shard].bytes, sha256=self.shards[shard].sha256)

    def _open(self, shard: int) -> int:
        """A file descriptor of the shard, fetched if need be."""
        for _ in range(_OPENINGS):
            try:
                return os.open(self._local(shard), os.O_RDONLY)
            except FileNotFoundError:
                # Another process made room between our look and our open; fetch it again.
                if "://" not in self.uris[shard]:
                    raise self._damaged(shard, "no such file") from None
        raise ConfigError(
            f"shards leave the cache {self._cache_config.folder} before they are read",
            remedy="raise cache.max_bytes, or lower data.streams or data.window",
        )

    def _read_local(self, files: Callable[[int], int], sample_id: int) -> bytes:
        shard, size = int(self._shard[sample_id]), int(self._size[sample_id])
        file = files(shard)
        content = os.pread(file, size, int(self._offset[sample_id]))
        if len(content) != size:
            raise self._damaged(shard, f"{os.fstat(file).st_size} bytes")
        return content

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
