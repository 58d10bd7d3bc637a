"""A bounded folder of shard copies that the processes of one node share.

A copy is named by its content's sha256, so equal shards of several data sets are kept once. It is
downloaded to a temporary name, verified and renamed; the stamp beside it (`.ok`) remembers the size and
modification time that were verified, and a copy that no longer matches its stamp is hashed again, and
fetched again when it differs. Readers open a copy for one batch only: an unlinked copy stays readable to
those who have it open (POSIX), so eviction needs no bookkeeping of readers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, NotFound

_STALE_S = 3600.0
_TRIES = 3  # downloads of a shard that arrives with a wrong size or hash


class ShardCache:
    """Copies of at most `max_bytes` in `folder`; the least recently used go first. Safe between processes."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def ensure(self, uri: str, *, size: int, sha256: str) -> Path:
        """The path of a verified copy of the shard, downloading it first if need be.

        Another process may evict it before the caller opens it; then call again.

        Raises ConfigError when the shard alone exceeds the cache, DataInvalid when the stored shard is not
        what the manifest says, StorageUnavailable when the store does not answer.
        """
        copy, stamp = self.folder / f"{sha256}.tar", self.folder / f"{sha256}.ok"
        if self._trusted(copy, stamp, size):
            return copy
        if size > self.max_bytes:
            raise ConfigError(
                f"the shard {uri} does not fit the cache",
                expected=f"at most {self.max_bytes} bytes",
                found=f"{size} bytes",
                remedy="raise cache.max_bytes",
            )
        with self._lock(sha256):
            if self._trusted(copy, stamp, size):
                return copy  # another process was faster
            # Others may evict a copy at any instant, but nobody else fetches this one while we hold its lock.
            intact = False
            with contextlib.suppress(FileNotFoundError):
                intact = copy.stat().st_size == size and storage.sha256_file(copy) == sha256
            if not intact:
                copy.unlink(missing_ok=True)
                self._make_room(size)
                self._download(uri, copy, size, sha256)
            with contextlib.suppress(FileNotFoundError):
                self._write_stamp(copy, stamp)
        return copy

    def _download(self, uri: str, copy: Path, size: int, sha256: str) -> None:
        for left in reversed(range(_TRIES)):
            try:
                storage.download_file(uri, copy, sha256=sha256, bytes=size)
                return
            except NotFound:
                raise
            except DataInvalid:
                # Damaged on its way, or in the store: only another try can tell.
                if not left:
                    raise

    def _trusted(self, copy: Path, stamp: Path, size: int) -> bool:
        try:
            status = copy.stat()
            known = json.loads(stamp.read_text())
            os.utime(stamp)  # last use, for eviction
        except (OSError, ValueError):
            return False
        return status.st_size == size and known == [status.st_size, status.st_mtime_ns]

    def _write_stamp(self, copy: Path, stamp: Path) -> None:
        status = copy.stat()
        temporary = stamp.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps([status.st_size, status.st_mtime_ns]))
        temporary.replace(stamp)

    def _make_room(self, incoming: int) -> None:
        with self._lock("eviction"):
            copies = []
            for copy in self.folder.glob("*.tar"):
                with contextlib.suppress(OSError):  # gone since
                    stamp = copy.with_suffix(".ok")
                    used = stamp.stat() if stamp.exists() else copy.stat()
                    copies.append((used.st_mtime_ns, copy.stat().st_size, copy))
            # Downloads of other processes count too; those of dead ones are swept after an hour.
            for partial in self.folder.glob(".*.tar.*"):
                with contextlib.suppress(OSError):
                    if time.time() - partial.stat().st_mtime > _STALE_S:
                        partial.unlink()
                    else:
                        incoming += partial.stat().st_size
            total = sum(size for _, size, _ in copies) + incoming
            for _, size, copy in sorted(copies):
                if total <= self.max_bytes:
                    break
                copy.unlink(missing_ok=True)
                copy.with_suffix(".ok").unlink(missing_ok=True)
                total -= size

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """An exclusive lock between processes; the kernel frees it when its holder dies."""
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
