"""Reading over any other protocol that fsspec speaks: what `cluster.storage` does for https://, gs://, hf://, memory://.

Nothing is written there: roots need exclusive creates and conditional writes, which these do not promise. The file
systems are made by `cluster.storage` and handed in. "Paths" are whole URIs. Each call is one attempt; retries
are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.hashing import sha256_bytes

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


class ForeignObjects:
    """The read-only store behind whole URIs.

    Args:
        open_filesystem: URI → (file system, its own path of the object).
        transient_errors: exception types that pass by themselves (connections, timeouts).
    """

    def __init__(
        self,
        open_filesystem: Callable[[str], tuple[Any, str]],
        transient_errors: tuple[type[BaseException], ...],
    ) -> None:
        self._open, self._transient = open_filesystem, transient_errors

    def stat(self, path: str, timeout_s: float) -> tuple[int, float] | None:
        """Size in bytes and mtime (seconds since the epoch) of an object, None when there is none."""
        filesystem, name = self._open(path)
        try:
            info = filesystem.info(name)
        except FileNotFoundError as error:
            if not self.missing(error):
                raise error.__cause__ or error from None
            return None
        if info.get("type") == "directory":
            return None
        return _size(filesystem, name, info), _time(info)

    def get(self, path: str, timeout_s: float) -> tuple[bytes, str]:
        """Content and version of an object."""
        filesystem, name = self._open(path)
        data = filesystem.cat_file(name)
        return data, sha256_bytes(data)

    def get_range(self, path: str, start: int, length: int, timeout_s: float) -> bytes:
        """At most `length` bytes from `start`."""
        filesystem, name = self._open(path)
        try:
            data = filesystem.cat_file(name, start=start, end=start + length)
        except Exception as error:
            if _status(error) == 416:  # the object ends before `start`
                return b""
            raise
        # A web server may ignore the range and send everything.
        whole = len(data) > length or (start > 0 and 0 < len(data) == self._size_of(path) > 0)
        return data[start : start + length] if whole else data

    def download(self, path: str, target: Path, timeout_s: float) -> None:
        """Copy the object to the local file `target`."""
        filesystem, name = self._open(path)
        filesystem.get_file(name, str(target))

    def find(self, path: str, most: int | None, timeout_s: float) -> list[tuple[str, int, float]]:
        """URI, size and mtime of the objects below the prefix, at most `most`; nothing where there is none."""
        filesystem, name = self._open(path)
        prefix = name.rstrip("/") + "/"
        try:
            found = filesystem.find(prefix, detail=True)
        except FileNotFoundError as error:
            if not self.missing(error):
                raise error.__cause__ or error from None
            return []
        below = ((item, info) for item, info in sorted(found.items()) if item.startswith(prefix))
        return [
            (f"{path}/{item[len(prefix) :]}", _size(filesystem, item, info), _time(info))
            for item, info in islice(below, most)
        ]

    def _size_of(self, path: str) -> int:
        found = self.stat(path, 0.0)
        return found[0] if found else 0

    def transient(self, error: Exception) -> bool:
        """Whether the same call may succeed a little later."""
        status = _status(error)
        return isinstance(error, self._transient) or status == 429 or (status or 0) >= 500

    def missing(self, error: FileNotFoundError) -> bool:
        """Whether the error says that the object is missing; fsspec also says so of a server that is not there."""
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError):
            return True
        return _status(cause) in (None, 404, 410) and not isinstance(cause, self._transient)

    def describe(self, error: Exception) -> str:
        """The error in one line."""
        return (str(error).splitlines() or [type(error).__name__])[0][:300]

    def explain(self, error: Exception) -> str | None:
        """What a person can do about an error of the store; None for an error that is not about storage."""
        if _status(error) in (401, 403) or isinstance(error, PermissionError):
            return "give this machine the credentials that the store asks for, or copy the object to s3:// or here"
        if _status(error) is not None or isinstance(error, (OSError, *self._transient)):
            return "check the address and the network, or copy the object to s3:// or to this machine"
        return None


def _size(filesystem: Any, name: str, info: dict[str, Any]) -> int:
    """Of an object; a listing, or a web server that streams, may not tell it."""
    size = info.get("size")
    if size is None:
        size = filesystem.size(name)
    return len(filesystem.cat_file(name)) if size is None else int(size)


def _time(info: dict[str, Any]) -> float:
    for key in _TIMES:
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _status(error: BaseException) -> int | None:
    """HTTP status of an error of any of the client libraries."""
    for name in ("status", "code", "status_code"):
        if isinstance(found := getattr(error, name, None), int):
            return found
    return None
