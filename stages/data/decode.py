"""Image bytes → RGB pixels: libjpeg-turbo (simplejpeg), Pillow for what that cannot read.

Only JPEG and PNG are read, told apart by their first bytes, never by name (ImageNet holds a PNG named
.JPEG). CMYK and YCCK JPEGs go through Pillow, which knows Adobe's inverted inks; grey images become RGB;
EXIF orientation is applied, so a photograph stands upright as its viewer showed it to the labeller.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from cluster.errors import DataInvalid

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 178_956_970  # Pillow's own bomb limit, about 13,400 squared
_EXIF_TO_PIL = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(DataInvalid):
    """One image cannot be decoded; the message is the reason."""


class Header(NamedTuple):
    """What the first bytes tell. `height` and `width` are upright, that is after EXIF orientation."""

    kind: str  # "jpeg" or "png"
    height: int
    width: int
    orientation: int  # EXIF 1…8; 1 is upright
    turbo: bool  # simplejpeg can decode it


def probe(data: bytes, *, max_bytes: int = MAX_FILE_BYTES, max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header; raises BadImage for anything that is not a JPEG or PNG within the caps."""
    if not data:
        raise BadImage("empty file")
    if len(data) > max_bytes:
        raise BadImage(f"{len(data)} bytes, more than the cap of {max_bytes}")
    if data[:2] == b"\xff\xd8":
        header = _probe_jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        header = _probe_png(data)
    else:
        raise BadImage(f"neither JPEG nor PNG: starts with {data[:4].hex()}")
    if header.height * header.width > max_pixels:
        raise BadImage(f"{header.width} x {header.height} pixels, more than the cap of {max_pixels}")
    return header


def decode(data: bytes, header: Header, *, min_height: int = 0, min_width: int = 0) -> np.ndarray:
    """uint8 (H, W, 3) RGB pixels, upright.

    With `min_height` and `min_width`, libjpeg-turbo may decode at 1/2, 1/4 or 1/8 as long as the upright
    result is at least that large; the other paths ignore them. Raises BadImage when the bytes are
    damaged, truncated images included.
    """
    if header.turbo:
        if header.orientation >= 5:
            min_height, min_width = min_width, min_height
        try:
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=min_height, min_width=min_width, min_factor=2 if min_height else 1
            )
            return _upright(pixels, header.orientation)
        except ValueError:
            pass  # recoverable oddities (bytes between markers) are errors to simplejpeg, not to Pillow
    return _decode_pillow(data, header)


def _decode_pillow(data: bytes, header: Header) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size was checked in `probe`
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                pixels = np.array(_to_rgb(image))  # a copy: torch warns of memory that may not be written
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise BadImage(f"{header.kind} does not decode: {error}") from None
    return _upright(pixels, header.orientation)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels lie over white, as they do on the pages that such images come from."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        flat = Image.new("RGBA", image.size, "white")
        flat.alpha_composite(image)
        return flat.convert("RGB")
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: keep the high byte. Pillow's own conversion would clip at 255.
        return Image.fromarray(
            (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return pixels
    return np.array(Image.fromarray(pixels).transpose(_EXIF_TO_PIL[orientation]))


def _probe_jpeg(data: bytes) -> Header:
    orientation = _exif_orientation(data)
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
        turbo = colourspace not in ("CMYK", "YCCK")
    except ValueError as error:
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                width, height = image.size
            turbo = False
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):
            raise BadImage(f"JPEG header is broken: {error}") from None
    if orientation >= 5:
        height, width = width, height
    return Header("jpeg", height, width, orientation, turbo)


def _probe_png(data: bytes) -> Header:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise BadImage("PNG header is broken")
    width, height = struct.unpack(">II", data[16:24])
    if not width or not height:
        raise BadImage("PNG of no pixels")
    orientation = _png_orientation(data)
    if orientation >= 5:
        height, width = width, height
    return Header("png", height, width, orientation, False)


def _png_orientation(data: bytes) -> int:
    """EXIF orientation of a PNG, from its eXIf chunk (PNG 3rd edition, 11.3.4.5), which may be behind the pixels."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"eXIf":
            return _tiff_orientation(data[position + 8 : position + 8 + length])
        position += 12 + length
    return 1


def _exif_orientation(data: bytes) -> int:
    """EXIF tag 0x0112 of a JPEG, 1 when absent or senseless. Walks the markers up to the first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in (0xDA, 0xD9):
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return _tiff_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(min(entries, 512)):
            at = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == 0x0112 and kind in (3, 4):  # SHORT, and LONG as some writers have it
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
