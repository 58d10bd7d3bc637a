"""All images of a source as columns.

A sample costs the bytes of its file name and about 50 bytes of numbers; folders are stored once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from stages.shard.listing import SAMPLES, Listing

_CHUNK = 1 << 16


class Table:
    """Columns of one length; rows are in the order of the listing, which nothing may depend on."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.folder, self.container = array("i"), array("i")
        self.offset, self.size = array("q"), array("q")
        self.aux: array | None = None  # only where a layout needs it (zip, Parquet)
        self.label: array | None = None  # only where the source states labels
        self._names: list[pa.Array] = []
        self._pending: list[str] = []
        self._ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.size)

    def add(self, found: Listing, folder_prefix: str = "") -> None:
        """Append a listing; `folder_prefix` goes before the folders of its paths."""
        for path in found.paths:
            folder, _, name = path.rpartition("/")
            number = self._ids.get(folder_prefix + folder)
            if number is None:
                number = self._ids[folder_prefix + folder] = len(self.folders)
                self.folders.append(folder_prefix + folder)
            self.folder.append(number)
            self._pending.append(name)
            if len(self._pending) == _CHUNK:
                self._flush()
        if self.aux is None and any(found.aux):
            self.aux = array("q", bytes(8 * len(self)))
        self.container.extend([found.unit["container"]] * len(found.paths))
        self.offset.extend(found.offset)
        self.size.extend(found.size)
        if self.aux is not None:
            self.aux.extend(found.aux)
        if found.kind == SAMPLES:
            self.label = array("i") if self.label is None else self.label
            self.label.extend(found.labels)

    def _flush(self) -> None:
        self._names.append(pa.array(self._pending, pa.string()))
        self._pending = []

    def chunks(self) -> Iterable[tuple[int, list[str]]]:
        """(first row, names) of successive runs of rows."""
        self._flush()
        begin = 0
        for chunk in self._names:
            yield begin, chunk.to_pylist()
            begin += len(chunk)

    def names(self, rows: np.ndarray) -> list[str]:
        """File names of some rows. Every chunk but the last has the same length."""
        self._flush()
        return [self._names[row // _CHUNK][row % _CHUNK].as_py() for row in rows.tolist()]
