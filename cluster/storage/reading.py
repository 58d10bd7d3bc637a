"""Look up, read and list objects."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO

from cluster.storage import calls
from cluster.storage.range_file import RangeFile
from cluster.storage.uris import join, scheme

READ_AHEAD_BYTES = 4 << 20  # one request of open_read; at 100 MB/s it takes as long as two round trips


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its URI, size in bytes, and time of writing (seconds since the epoch)."""

    uri: str
    bytes: int
    mtime: float


def exists(uri: str) -> bool:
    """Whether there is an object of this name; a folder or prefix is none (see `list_files`)."""
    return calls.call(uri, "stat") is not None


def size(uri: str) -> int:
    """Size in bytes; raises NotFound."""
    found = calls.call(uri, "stat")
    if found is None:
        raise calls.not_found(uri)
    return found[0]


def read_bytes(uri: str) -> bytes:
    """The whole object, for small ones; raises NotFound."""
    return read_versioned(uri)[0]


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from offset `start`; fewer at the end of the object. Raises NotFound."""
    if length <= 0:
        return b""
    return calls.call(uri, "get_range", start, length, transfer_bytes=length)


def read_versioned(uri: str) -> tuple[bytes, str]:
    """The whole object and a token of this version, for `replace_if`; raises NotFound."""
    return calls.call(uri, "get")


def open_read(uri: str) -> BinaryIO:
    """The object as a buffered, seekable binary file; every piece is read with the retries of `read_range`.

    Raises NotFound at once, not at the first read.
    """
    return io.BufferedReader(RangeFile(read_range, join(uri), size(uri)), READ_AHEAD_BYTES)


def list_files(
    uri_prefix: str, *, most: int | None = None, deadline_s: float | None = None
) -> list[ObjectInfo]:
    """The objects below the prefix, recursively, sorted by URI; [] when there is none. `most` ends it early."""
    items = calls.call(uri_prefix, "find", most, deadline_s=deadline_s)
    front = scheme(uri_prefix)
    return sorted(
        (ObjectInfo(front + path, size, mtime) for path, size, mtime in items), key=lambda item: item.uri
    )
