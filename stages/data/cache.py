"""A bounded folder of shard copies that the processes of one node share.

A copy is named by its content's sha256, so equal shards of several data sets are kept once. It is
downloaded into a folder of its own (`<sha256>.<bytes>.part`), verified and renamed. That folder reserves the
bytes from the moment on when room for them was made, for as long as its maker lives; a dead one's is swept
by whoever makes room next. So copies and downloads together never exceed the bound.

The stamp beside a copy (`.ok`) remembers the size and modification time that were verified, and a copy that
no longer matches its stamp is hashed again, and fetched again when it differs. Readers open a copy for one
batch only: an unlinked copy stays readable to those who have it open (POSIX), so eviction needs no
bookkeeping of readers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, NotFound
from cluster.storage.local_files import TEMPORARY

_STALE_S = 3600.0  # age of temporary files that nobody claims
_POLL_S = 0.02  # while the downloads of others fill the cache
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
                with self._reserved(sha256, size) as folder:
                    self._download(uri, folder / "copy", size, sha256)
                    with self._lock("eviction"):  # so that the bytes are not counted twice
                        (folder / "copy").replace(copy)
                        folder.rmdir()
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

    @contextlib.contextmanager
    def _reserved(self, sha256: str, size: int) -> Iterator[Path]:
        """A folder to download to, once there is room for `size` bytes. The caller holds the lock of `sha256`."""
        folder = self.folder / f"{sha256}.{size}.part"
        while not self._make_room(folder, size):
            time.sleep(_POLL_S)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _make_room(self, folder: Path, incoming: int) -> bool:
        """Evict until `incoming` bytes fit, and reserve them; False when others' downloads leave no room."""
        with self._lock("eviction"):
            for leftover in self.folder.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(OSError):
                    if time.time() - leftover.stat().st_mtime > _STALE_S:
                        leftover.unlink()
            reserved = sum(self._downloading(part) for part in self.folder.glob("*.part") if part != folder)
            if reserved + incoming > self.max_bytes:
                return False
            shutil.rmtree(folder, ignore_errors=True)  # of a dead process that fetched the same shard
            copies = []
            for copy in self.folder.glob("*.tar"):
                with contextlib.suppress(OSError):  # gone since
                    stamp = copy.with_suffix(".ok")
                    used = stamp.stat() if stamp.exists() else copy.stat()
                    copies.append((used.st_mtime_ns, copy.stat().st_size, copy))
            total = sum(size for _, size, _ in copies) + reserved + incoming
            for _, size, copy in sorted(copies):
                if total <= self.max_bytes:
                    break
                copy.unlink(missing_ok=True)
                copy.with_suffix(".ok").unlink(missing_ok=True)
                total -= size
            folder.mkdir()
            return True

    def _downloading(self, part: Path) -> int:
        """Bytes that a download reserves; 0 for a dead one's, which is removed."""
        sha256, size, _ = part.name.split(".")
        with (self.folder / f"{sha256}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(size)  # its maker holds the lock until it is done
            shutil.rmtree(part, ignore_errors=True)
            return 0

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """An exclusive lock between processes; the kernel frees it when its holder dies."""
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
