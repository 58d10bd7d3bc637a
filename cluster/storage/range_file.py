"""An object in storage as a seekable file, read by ranges."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class RangeFile(io.RawIOBase):
    """A raw binary file over `read_range(uri, start, length)`; wrap it in io.BufferedReader.

    An object's content never changes under its name, so the ranges belong together.
    """

    def __init__(self, read_range: Callable[[str, int, int], bytes], uri: str, length: int) -> None:
        self._read_range, self._uri, self._length = read_range, uri, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._length)

    def _next(self, length: int) -> bytes:
        data = self._read_range(self._uri, self._position, min(length, self._length - self._position))
        self._position += len(data)
        return data
