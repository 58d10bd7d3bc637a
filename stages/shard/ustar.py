"""Write tar files of fixed metadata, hashing as they grow.

Python's `tarfile` builds an object and several dictionaries per member; a shard needs only regular files
with constant owner, mode and time (so that equal content gives equal bytes), for which a POSIX ustar
header is 512 bytes of plain fields (IEEE Std 1003.1, pax "ustar Interchange Format").
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK = 512
_MAX_SIZE = 8**11 - 1
_OWNER = b"0000644\0" + 2 * b"0000000\0"  # mode, uid, gid
_TIME = b"00000000000\0"
_KIND = b"0" + bytes(100) + b"ustar\x0000" + bytes(80)  # regular file, no link, format, no names, no device
_CONSTANT_SUM = (
    sum(_OWNER) + sum(_TIME) + 8 * ord(" ") + sum(_KIND)
)  # the checksum's own field counts as spaces
_HASH_BYTES = 1 << 20  # 1 ms of hashing: a hand-over costs a tenth of that


class TarWriter:
    """Appends members to a new local tar file. `offset` is where the next header goes.

    Args:
        path: the file to make.
        hash_beside: hash in a thread. Hashing costs as much as reading and writing together and all three
            release the interpreter lock, so a spare core saves a third of the time; without one it is cheaper
            to hash bytes while they are in the cache.
    """

    def __init__(self, path: Path, *, hash_beside: bool = False) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1) if hash_beside else None
        self._hashing: Future[None] | None = None
        self._unhashed: list[bytes] = []
        self._unhashed_bytes = 0
        self.offset = 0

    def add_pair(self, name: str, data: bytes, label_name: str, label: bytes) -> int:
        """Append an image and its label; returns the offset of the image's first byte.

        One write and three hash updates for both: small pieces cost more than the bytes they hold.
        ValueError if ustar cannot hold a name or a size.
        """
        head = header(name, len(data))
        tail = b"".join(
            (bytes(-len(data) % BLOCK), header(label_name, len(label)), label, bytes(-len(label) % BLOCK))
        )
        begin = self.offset + BLOCK
        self._write(head, data, tail)
        return begin

    def close(self) -> tuple[int, str]:
        """End the archive; returns its size in bytes and sha256."""
        self._write(bytes(2 * BLOCK))
        self._hash()
        if self._hasher is not None:
            self._hasher.shutdown()
        self._file.close()
        return self.offset, self._sha256.hexdigest()

    def abort(self) -> None:
        """Close the file without ending the archive."""
        if self._hasher is not None:
            self._hasher.shutdown()
        self._file.close()

    def _write(self, *pieces: bytes) -> None:
        total = sum(map(len, pieces))
        if os.writev(self._file.fileno(), pieces) != total:
            raise OSError(errno.ENOSPC, "the disk took a part of a write", self._file.name)
        self.offset += total
        if self._hasher is None:
            self._update(pieces)
            return
        self._unhashed += pieces
        self._unhashed_bytes += total
        if self._unhashed_bytes >= _HASH_BYTES:
            self._hash()

    def _hash(self) -> None:
        """Hand what was written to the hashing thread, which is one such batch behind at most."""
        if self._hasher is None:
            return
        if self._hashing is not None:
            self._hashing.result()
        batch, self._unhashed, self._unhashed_bytes = self._unhashed, [], 0
        self._hashing = self._hasher.submit(self._update, batch)

    def _update(self, batch: Iterable[bytes]) -> None:
        for piece in batch:
            self._sha256.update(piece)


def header(name: str, size: int) -> bytes:
    """The 512-byte header of a regular file; ValueError when name or size do not fit."""
    if size > _MAX_SIZE:
        raise ValueError(f"{size} bytes do not fit a ustar header")
    prefix, base = _split(name.encode())
    digits = b"%011o\0" % size
    total = _CONSTANT_SUM + sum(base) + sum(digits) + sum(prefix)
    return b"".join(
        (
            base,
            bytes(100 - len(base)),
            _OWNER,
            digits,
            _TIME,
            b"%06o\0 " % total,
            _KIND,
            prefix,
            bytes(167 - len(prefix)),
        )
    )


def fits(name: str) -> bool:
    """Whether ustar can hold the name: 100 bytes, or 155 more before a slash."""
    try:
        _split(name.encode())
    except ValueError:
        return False
    return True


def _split(name: bytes) -> tuple[bytes, bytes]:
    if len(name) <= 100:
        return b"", name
    cut = name.rfind(b"/", 0, 156)
    if cut <= 0 or len(name) - cut - 1 > 100:
        raise ValueError(f"name of {len(name)} bytes does not fit a ustar header: {name[:60]!r}…")
    return name[:cut], name[cut + 1 :]
