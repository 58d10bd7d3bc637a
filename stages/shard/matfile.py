"""Read the struct array in ImageNet's `meta.mat` without scipy: level 5 MAT-files, as much as it uses.

Source: MathWorks, "MAT-File Format", chapter 1 (level 5). Little-endian numeric, character, cell and struct
arrays, compressed or not; anything else is refused.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

_NUMBERS = {
    1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8",
}  # fmt: skip
_MATRIX, _COMPRESSED, _UTF8, _UTF16 = 14, 15, 16, 17
_CELL, _STRUCT, _CHAR = 1, 2, 4
_MAX_BYTES = 2**28  # of an inflated element; meta.mat has about 2 MB


def read_mat(data: bytes) -> dict[str, Any]:
    """Variables by name: numbers as arrays, characters as str, cells as lists, structs as lists of dicts.

    Raises ValueError for anything that is not a level 5 MAT-file of these types.
    """
    if len(data) < 128 or data[126:128] != b"IM":
        raise ValueError("not a little-endian level 5 MAT-file")
    variables: dict[str, Any] = {}
    position = 128
    try:
        while position + 8 <= len(data):
            kind, content, position = _element(data, position)
            if kind == _COMPRESSED:
                inflater = zlib.decompressobj()
                content = inflater.decompress(content, _MAX_BYTES)
                if inflater.unconsumed_tail:
                    raise ValueError("an element inflates beyond 256 MiB")
                kind, content, _ = _element(content, 0)
            if kind == _MATRIX:
                name, value = _matrix(content)
                variables[name] = value
    except (struct.error, zlib.error, KeyError, IndexError) as error:
        raise ValueError(f"damaged MAT-file: {error}") from None
    return variables


def _element(data: bytes, position: int) -> tuple[int, bytes, int]:
    """Type, content and the position after one data element; small elements hold theirs inside the tag."""
    kind, size = struct.unpack_from("<II", data, position)
    if kind >> 16:
        return kind & 0xFFFF, data[position + 4 : position + 4 + (kind >> 16)], position + 8
    begin = position + 8
    if begin + size > len(data):
        raise ValueError("cut short")
    padding = 0 if kind == _COMPRESSED else -size % 8
    return kind, data[begin : begin + size], begin + size + padding


def _matrix(data: bytes) -> tuple[str, Any]:
    if not data:
        return "", []  # an empty field
    _, flags, at = _element(data, 0)
    _, dimensions, at = _element(data, at)
    _, name, at = _element(data, at)
    array_class = flags[0]
    count = int(np.prod(np.frombuffer(dimensions, "<i4"), dtype=np.int64))
    value: Any
    if array_class == _CELL:
        value = []
        for _ in range(count):
            _, item, at = _element(data, at)
            value.append(_matrix(item)[1])
    elif array_class == _STRUCT:
        _, length, at = _element(data, at)
        _, names, at = _element(data, at)
        (width,) = struct.unpack("<i", length)
        fields = [names[i : i + width].split(b"\0")[0].decode() for i in range(0, len(names), width)]
        value = []
        for _ in range(count):
            row = {}
            for field in fields:
                _, item, at = _element(data, at)
                row[field] = _matrix(item)[1]
            value.append(row)
    else:
        kind, content, _ = _element(data, at)
        if array_class == _CHAR:
            encoding = {_UTF8: "utf-8", _UTF16: "utf-16-le", 4: "utf-16-le"}.get(kind, "latin-1")
            value = content.decode(encoding)
        else:
            value = np.frombuffer(content, _NUMBERS[kind])
    return name.decode("latin-1"), value
