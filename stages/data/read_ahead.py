"""Copy shards into the node's cache before the loaders ask for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import ItpnError
from stages.data.dataset import ShardDataset
from stages.data.order import Order

_PATIENCE_S = 5.0
_DOWNLOADS = 4  # at once; one connection to an object store brings about 50-100 MB/s


class ReadAhead:
    """A thread that walks this rank's order and fetches each shard before its first sample is due.

    It runs ahead of the consumer (`advance`) until the shards fetched but not yet needed fill a quarter of
    the cache, so that it never pushes out what is in use. Only this rank's streams are walked: a node
    fetches what its ranks read. Errors are left to the reader, who meets them again where they matter.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        order: Order,
        rank: int,
        world_size: int,
        cursors: Iterator[tuple[int, int]],
    ) -> None:
        self._dataset, self._order, self._rank, self._world_size = dataset, order, rank, world_size
        self._cursors = cursors
        self._limit = dataset.cache_bytes // 4
        self._ahead: deque[tuple[tuple[int, int], int]] = deque()  # (cursor of first use, bytes)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._walk, name="read-ahead", daemon=True)
        self._thread.start()

    def advance(self, cursor: tuple[int, int]) -> None:
        """The consumer has got the batch at `cursor`."""
        with self._changed:
            while self._ahead and self._ahead[0][0] <= cursor:
                self._ahead.popleft()
            self._changed.notify()

    def close(self) -> None:
        """Stop after the downloads under way."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_PATIENCE_S)  # a daemon: one that hangs in a dead store is left behind

    def _walk(self) -> None:
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            epoch, seen = -1, set[int]()
            for cursor in self._cursors:
                if cursor[0] != epoch:
                    epoch, seen = cursor[0], set()
                ids = self._order.rank_batch(*cursor, self._rank, self._world_size)
                for shard in sorted(set(self._order.shard_of(ids).tolist()) - seen):
                    seen.add(shard)
                    if not self._wait_for_room(cursor, self._dataset.shards[shard].bytes):
                        return
                    pool.submit(self._fetch, shard)

    def _wait_for_room(self, cursor: tuple[int, int], size: int) -> bool:
        with self._changed:
            while not self._closed and self._ahead and sum(b for _, b in self._ahead) + size > self._limit:
                self._changed.wait()
            self._ahead.append((cursor, size))
            return not self._closed

    def _fetch(self, shard: int) -> None:
        try:
            if not self._closed:
                self._dataset.fetch(shard)
        except ItpnError:
            pass
