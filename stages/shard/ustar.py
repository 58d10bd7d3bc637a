"""Write tar files of fixed metadata, hashing as they grow.

Python's `tarfile` builds an object and several dictionaries per member; a shard needs only regular files
with constant owner, mode and time (so that equal content gives equal bytes), for which a POSIX ustar
header is 512 bytes of plain fields (IEEE Std 1003.1, pax "ustar Interchange Format").
"""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK = 512
_MAX_SIZE = 8**11 - 1
_HASH_BYTES = 1 << 20  # 1 ms of hashing: a hand-over costs a tenth of that


class TarWriter:
    """Appends members to a new local tar file. `offset` is where the next header goes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        # Hashing costs as much as reading and writing together, and all three release the interpreter lock.
        self._hasher = ThreadPoolExecutor(1)
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
        self._hasher.shutdown()
        self._file.close()
        return self.offset, self._sha256.hexdigest()

    def abort(self) -> None:
        """Close the file without ending the archive."""
        self._hasher.shutdown()
        self._file.close()

    def _write(self, *pieces: bytes) -> None:
        total = sum(map(len, pieces))
        if os.writev(self._file.fileno(), pieces) != total:
            raise OSError(errno.ENOSPC, "the disk took a part of a write", self._file.name)
        self.offset += total
        self._unhashed += pieces
        self._unhashed_bytes += total
        if self._unhashed_bytes >= _HASH_BYTES:
            self._hash()

    def _hash(self) -> None:
        """Hand what was written to the hashing thread, which is one such batch behind at most."""
        if self._hashing is not None:
            self._hashing.result()
        batch, self._unhashed, self._unhashed_bytes = self._unhashed, [], 0
        self._hashing = self._hasher.submit(self._update, batch)

    def _update(self, batch: list[bytes]) -> None:
        for piece in batch:
            self._sha256.update(piece)


def header(name: str, size: int) -> bytes:
    """The 512-byte header of a regular file; ValueError when name or size do not fit."""
    if size > _MAX_SIZE:
        raise ValueError(f"{size} bytes do not fit a ustar header")
    prefix, base = _split(name.encode())
    block = bytearray(BLOCK)
    block[0 : len(base)] = base
    block[100:124] = b"0000644\x00" + 2 * b"0000000\x00"  # mode, uid, gid
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"00000000000\0"  # mtime 0
    block[148:156] = b"        "  # the checksum is taken over spaces in its own place
    block[156:157] = b"0"  # regular file
    block[257:265] = b"ustar\x0000"
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


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
