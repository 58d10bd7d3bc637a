"""Decoding and views against Pillow on real images, and the oddities of real data sets."""

from __future__ import annotations

import io
import math
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from stages.data import region
from stages.data.crop import Box, crop_draws, random_resized_crop
from stages.data.decode import BadImage, decode, probe
from stages.data.view import EvalView, TrainView, decode_crop, resize
from tests.stages.images import jpeg, picture

CLIPART = Path(__file__).parents[3] / "assets" / "clipart-12.tar"


@pytest.fixture(scope="session")
def clipart() -> list[bytes]:
    """24 real JPEGs of the bundled data set."""
    with tarfile.open(CLIPART) as tar:
        members = [m for m in tar if m.name.endswith(".jpg")]
        return [tar.extractfile(m).read() for m in members[:: len(members) // 24]][:24]  # type: ignore[union-attr]


def pillow(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def difference(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.abs(left.astype(int) - right.astype(int))


def test_decoding_equals_pillow(clipart: list[bytes]) -> None:
    for data in clipart:
        assert difference(decode(data, probe(data)), np.asarray(pillow(data))).max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(jpeg(picture(1).convert("L")), id="grey"),
        pytest.param(jpeg(picture(1).convert("CMYK")), id="CMYK"),
        pytest.param(jpeg(picture(1), progressive=True), id="progressive"),
        pytest.param(jpeg(picture(1), subsampling=0), id="4:4:4"),
    ],
)
def test_unusual_jpegs_are_read_as_pillow_reads_them(data: bytes) -> None:
    header = probe(data)
    assert (header.kind, header.height, header.width) == ("jpeg", 48, 64)
    assert difference(decode(data, header), np.asarray(pillow(data))).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "I;16", "1"])
def test_png_of_any_mode_becomes_rgb(mode: str) -> None:
    image = picture(2)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), probe(buffer.getvalue()))
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    expected = np.asarray(picture(2).convert("L" if mode in ("L", "LA", "I;16") else "RGB").convert("RGB"))
    if mode not in ("P", "1"):
        assert difference(pixels, expected).max() <= 1


def test_transparent_pixels_lie_over_white() -> None:
    image = picture(2).convert("RGBA")
    image.putalpha(0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert (decode(buffer.getvalue(), probe(buffer.getvalue())) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_everywhere(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(3).save(buffer, kind, exif=exif.tobytes())
    data = buffer.getvalue()
    upright = np.asarray(pillow(data))
    header = probe(data)
    assert (header.height, header.width) == upright.shape[:2]
    pixels = decode(data, header)
    assert difference(pixels, upright).max() <= 2 and pixels.flags.writeable
    box = Box(5, 7, 20, 30)
    assert difference(decode_crop(data, header, box, min_side=20), upright[5:25, 7:37]).max() <= 2


def test_scaled_decoding_is_used_only_where_the_crop_stays_large_enough() -> None:
    image = picture(4, height=512, width=640)
    data = jpeg(image, quality=95)
    header = probe(data)
    full = decode_crop(data, header, Box(100, 100, 300, 300), min_side=224)
    assert full.shape == (300, 300, 3)
    half = decode_crop(data, header, Box(16, 32, 480, 480), min_side=224)
    assert half.shape == (240, 240, 3)
    reference = np.asarray(pillow(data).crop((32, 16, 512, 496)).resize((240, 240), Image.Resampling.BOX))
    assert difference(half, reference).mean() < 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a", "neither JPEG nor PNG"),
        (b"\xff\xd8\xff\xe0", "header is broken"),
        (b"\x89PNG\r\n\x1a\n", "header is broken"),
        (jpeg(picture(5))[:-400], "does not decode"),
        (jpeg(picture(5))[:-2], None),  # only the end marker is missing: libjpeg has every pixel
    ],
)
def test_broken_images_give_a_reason(data: bytes, reason: str | None) -> None:
    def read() -> None:
        decode(data, probe(data))

    if reason is None:
        read()
        return
    with pytest.raises(BadImage, match=reason):
        read()
    with pytest.raises(BadImage, match=reason):
        TrainView(size=16).render(data, crop_draws(0, 0, np.array([1]))[0])


def test_bombs_are_refused_by_their_header() -> None:
    ihdr = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + ihdr
        + struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
    )
    with pytest.raises(BadImage, match="60000 x 60000 pixels"):
        probe(png + bytes(100))
    with pytest.raises(BadImage, match="cap of 100"):
        probe(jpeg(picture(1)), max_bytes=100)


def test_resizing_equals_pillow_within_rounding(clipart: list[bytes]) -> None:
    """Measured: 97 % of values equal, 99.99 % within 1, none beyond 4 of 255."""
    worst = []
    for data, size in zip(clipart, [32, 64, 96, 100, 160, 224] * 4, strict=True):
        image = pillow(data)
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        worst.append(difference(resize(np.asarray(image), size, size).numpy(), expected))
    flat = np.concatenate([w.ravel() for w in worst])
    assert (flat <= 1).mean() > 0.999 and flat.max() <= 4


def test_the_training_view_is_pillows_crop_and_resize(clipart: list[bytes]) -> None:
    view = TrainView(size=48, min_scale=0.2)
    for sample_id, data in enumerate(clipart):
        draws = view.draws(1, 2, np.array([sample_id]))[0]
        image = pillow(data)
        box = random_resized_crop(image.height, image.width, draws, scale=(0.2, 1), ratio=(3 / 4, 4 / 3))
        cropped = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        expected = np.asarray(cropped.resize((48, 48), Image.Resampling.BICUBIC))
        off = difference(view.render(data, draws).numpy(), expected)
        assert off.max() <= 8 and off.mean() < 0.4


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_eval_view_is_pillows_resize_and_centre_crop(clipart: list[bytes], crop_pct: float) -> None:
    for data in [*clipart, jpeg(picture(7, height=90, width=201)), jpeg(picture(7, height=150, width=70))]:
        image = pillow(data)
        short = int(64 / crop_pct)
        scale = short / min(image.size)
        size = tuple(short if n == min(image.size) else int(n * scale) for n in image.size)
        left, top = round((size[0] - 64) / 2), round((size[1] - 64) / 2)
        resized = image.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
        expected = np.asarray(resized.crop((left, top, left + 64, top + 64)))
        found = EvalView(size=64, crop_pct=crop_pct).render(data, np.empty(0)).numpy()
        assert difference(found, expected).max() <= 4


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 2**63),
    st.floats(0.01, 1.0),
)
def test_crops_lie_inside_the_image(height: int, width: int, seed: int, min_scale: float) -> None:
    draws = crop_draws(seed, 0, np.array([0]))[0]
    box = random_resized_crop(height, width, draws, scale=(min_scale, 1), ratio=(3 / 4, 4 / 3))
    assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width


def reference_share(count: int) -> float:
    """Mean share of the area by torchvision's RandomResizedCrop.get_params, written with `random`."""
    generator, shares = random.Random(0), []
    for _ in range(count):
        for _ in range(10):
            area = 375 * 500 * generator.uniform(0.2, 1)
            aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= 500 and h <= 375:
                shares.append(w * h / (375 * 500))
                break
        else:
            shares.append(1.0)
    return sum(shares) / count


def test_crops_have_the_stated_distribution() -> None:
    boxes = [
        random_resized_crop(375, 500, draws, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
        for draws in crop_draws(0, 0, np.arange(4000))
    ]
    share = np.array([b.height * b.width for b in boxes]) / (375 * 500)
    aspect = np.array([b.width / b.height for b in boxes])
    assert share.min() > 0.19 and share.max() <= 1
    assert 0.74 < aspect.min() < 0.78 and 1.30 < aspect.max() < 1.35
    assert abs(share.mean() - reference_share(4000)) < 0.02
    left = np.array([b.left / (500 - b.width) for b in boxes if b.width < 500])
    assert abs(left.mean() - 0.5) < 0.02 and abs(left.std() - 12**-0.5) < 0.02


@pytest.mark.skipif(not region.available(), reason="nvImageCodec is not installed")
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
def test_region_decoding_changes_no_pixel(options: dict) -> None:
    data = jpeg(picture(8, height=211, width=317), **options)
    full = decode(data, probe(data))
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = int(rng.integers(1, 212)), int(rng.integers(1, 318))
        top, left = int(rng.integers(0, 212 - height)), int(rng.integers(0, 318 - width))
        found = region.decode_region(data, Box(top, left, height, width))
        assert found is not None
        assert np.array_equal(found, full[top : top + height, left : left + width])


def test_without_region_decoding_the_view_is_the_same(
    clipart: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = TrainView(size=48)
    draws = view.draws(0, 0, np.arange(len(clipart)))
    with_regions = [view.render(data, row) for data, row in zip(clipart, draws, strict=True)]
    monkeypatch.setattr(region, "_codec", lambda: None)
    for data, row, expected in zip(clipart, draws, with_regions, strict=True):
        assert np.array_equal(view.render(data, row), expected)


def test_an_orientation_behind_a_pngs_pixels_is_applied_and_a_broken_one_ignored() -> None:
    buffer = io.BytesIO()
    picture(1, height=40, width=60).save(buffer, "PNG")
    whole = buffer.getvalue()
    for tiff, upright in (
        (b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, 8, 0), 8),
        (b"II*\0\xff", 1),
    ):
        body = b"eXIf" + tiff
        chunk = struct.pack(">I", len(tiff)) + body + struct.pack(">I", zlib.crc32(body))
        data = whole[:-12] + chunk + whole[-12:]  # before IEND
        header = probe(data)
        assert header.orientation == upright
        assert decode(data, header).shape == ((60, 40, 3) if upright == 8 else (40, 60, 3))


def test_an_orientation_written_as_long_is_applied() -> None:
    tiff = b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 4, 1, 6)
    app1 = b"Exif\0\0" + tiff
    whole = jpeg(picture(1, height=40, width=60))
    rotated = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + whole[2:]
    assert probe(rotated).orientation == 6 and decode(rotated, probe(rotated)).shape == (60, 40, 3)
