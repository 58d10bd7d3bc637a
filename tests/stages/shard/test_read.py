"""Reading a source: few requests, bounded memory, the same bytes from a store as from a disk; re-encoding."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from cluster import storage
from cluster.errors import ConfigError
from cluster.storage import calls
from stages.artifacts import DatasetRef
from stages.data.dataset import ShardDataset
from stages.data.decode import decode, probe
from stages.data.manifest import load_manifest, resolve
from stages.shard.config import ShardConfig
from stages.shard.read import GAP_BYTES, plan_runs
from tests.stages.images import jpeg, picture, shard_folder
from tests.stages.shard.archives import (
    WNIDS,
    class_images,
    contents,
    official,
    tar_bytes,
    write_parquet,
)


def test_neighbours_come_in_one_request() -> None:
    near = plan_runs([0, 0, 0, 1], [2000, 0, 1000, 3000], [1000] * 4)
    assert [sorted(run) for run in near] == [[0, 1, 2], [3]]
    far = plan_runs([0, 0], [0, 1001 + GAP_BYTES], [1000, 1000])
    assert far == [[0], [1]]
    assert len(plan_runs([0] * 10, list(range(0, 10_000, 1000)), [1000] * 10, run_bytes=3000)) == 4
    assert plan_runs([-1, -1], [0, 0], [5, 5]) == [[0], [1]]  # files of their own are never joined


@pytest.mark.parametrize("kind", ["official", "zip", "folder", "parquet"])
def test_an_object_store_gives_the_same_shards_as_a_disk(
    tmp_path: Path, moto_root: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [(f"{w}/{name}", data) for w in WNIDS for name, data in class_images(w)]
    source = tmp_path / "in"
    source.mkdir()
    if kind == "official":
        official(source)
    elif kind == "zip":
        with zipfile.ZipFile(source / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in images:
                archive.writestr(name, data)
    elif kind == "parquet":
        rows = [(data, None, WNIDS.index(name[:9])) for name, data in images]
        write_parquet(source / "train-00000-of-00001.parquet", rows, list(WNIDS))
    else:
        for name, data in images:
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(data)
    storage.upload_tree(source, f"{moto_root}/in")
    local = shard_folder(source, tmp_path / "out", shard_samples=9)
    requests = []
    original = calls.call
    monkeypatch.setattr(calls, "call", lambda *a, **k: requests.append(a[1]) or original(*a, **k))
    remote = shard_folder(f"{moto_root}/in", tmp_path / "remote", shard_samples=9)  # type: ignore[arg-type]
    assert remote.fingerprint == local.fingerprint and contents(remote) == contents(local)
    assert requests.count("get_range") < 30  # 22 images, their headers, and the labels: coalesced


def test_writing_to_an_object_store_gives_the_same_shards(
    image_folder: Path, tiny_dataset: DatasetRef, moto_root: str
) -> None:
    from cluster.resources import Resources
    from stages.context import StageContext
    from stages.shard.stage import run

    config = ShardConfig(name="tiny", source=str(image_folder), shard_samples=8)
    ref = run(config, {}, StageContext(out=f"{moto_root}/out", resources=Resources())).artifact
    assert isinstance(ref, DatasetRef) and ref.fingerprint == tiny_dataset.fingerprint
    manifest = load_manifest(ref.manifest)
    shard = manifest.splits["train"].shards[0]
    data = storage.read_bytes(resolve(ref.manifest, manifest, shard.path))
    assert storage.sha256_bytes(data) == shard.sha256


def test_images_beyond_max_side_are_shrunk_and_others_kept(image_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "c").mkdir(parents=True)
    small, large = jpeg(picture(1)), jpeg(picture(2, height=300, width=400))
    (source / "c/small.jpg").write_bytes(small)
    (source / "c/large.jpg").write_bytes(large)
    rotated = Image.new("RGB", (400, 300), "red")
    exif = rotated.getexif()
    exif[0x0112] = 6
    (source / "c/rotated.jpg").write_bytes(jpeg(rotated, exif=exif))
    picture(3, height=300, width=400).save(source / "c/large2.png")
    found = contents(shard_folder(source, tmp_path / "out", max_side=128, quality=80))["train"]
    assert found["c/small"] == ("jpg", small, 0)
    sizes = {key: (probe(data).height, probe(data).width) for key, (_, data, _) in found.items()}
    assert sizes["c/large"] == sizes["c/large2"] == (96, 128) and sizes["c/rotated"] == (128, 96)
    assert {suffix for suffix, *_ in found.values()} == {"jpg"}
    pixels = decode(found["c/large"][1], probe(found["c/large"][1])).astype(float)
    expected = np.asarray(Image.open(io.BytesIO(large)).resize((128, 96), Image.Resampling.LANCZOS))
    assert np.abs(pixels - expected).mean() < 4


@pytest.mark.parametrize("layout", ["folder", "zip", "tar"])
def test_images_over_the_caps_are_left_out_with_the_reason(tmp_path: Path, layout: str) -> None:
    fine, wide = jpeg(picture(1)), jpeg(picture(2, height=300, width=400))
    heavy = fine + bytes(100_000)  # deflates to nothing: what a small archive member may unpack to
    files = {"c/fine.jpg": fine, "c/heavy.jpg": heavy, "c/wide.jpg": wide}
    source = tmp_path / "in"
    if layout == "folder":
        (source / "c").mkdir(parents=True)
        for path, data in files.items():
            (source / path).write_bytes(data)
    elif layout == "zip":
        source = tmp_path / "in.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in files.items():
                archive.writestr(path, data)
    else:
        source = tmp_path / "in.tar"
        source.write_bytes(tar_bytes(files.items()))
    ref = shard_folder(
        source, tmp_path / "out", max_file_bytes=90_000, max_pixels=300 * 400 - 1, max_bad_fraction=0.7
    )
    assert contents(ref)["train"] == {"c/fine": ("jpg", fine, 0)}
    reasons = {Path(item.source).name: item.reason for item in load_manifest(ref.manifest).skipped}
    assert reasons == {
        "heavy.jpg": f"{len(heavy)} bytes, more than the cap of 90000",
        "wide.jpg": "400 x 300 pixels, more than the cap of 119999",
    }


def test_odd_images_are_kept_as_they_are_and_read_upright_in_rgb(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "c").mkdir(parents=True)
    base = picture(4, height=60, width=80)
    rotated = base.copy()
    exif = rotated.getexif()
    exif[0x0112] = 6
    png = io.BytesIO()
    base.save(png, "PNG")
    turned = io.BytesIO()
    rotated.save(turned, "PNG", exif=exif)
    files = {
        "cmyk.jpg": jpeg(base.convert("CMYK")),
        "grey.jpg": jpeg(base.convert("L")),
        "named.JPEG": png.getvalue(),
        "rotated.jpg": jpeg(rotated, exif=exif),
        "turned.png": turned.getvalue(),
    }
    for name, data in files.items():
        (source / "c" / name).write_bytes(data)
    ref = shard_folder(source, tmp_path / "out", verify="decode")
    found = contents(ref)["train"]
    assert {key: (suffix, data) for key, (suffix, data, _) in found.items()} == {
        f"c/{name.split('.')[0]}": ("png" if name in ("named.JPEG", "turned.png") else "jpg", data)
        for name, data in files.items()
    }
    dataset = ShardDataset.open(ref.manifest, "train")
    reference = np.asarray(base).astype(float)
    for sample in dataset.read(np.arange(5)):
        pixels = decode(sample.bytes, probe(sample.bytes)).astype(float)
        if sample.key in ("c/rotated", "c/turned"):
            pixels = np.rot90(pixels)  # orientation 6 asks for a quarter turn clockwise
        if sample.key == "c/grey":
            assert np.ptp(pixels, axis=2).max() == 0
            reference_here = np.asarray(base.convert("L").convert("RGB")).astype(float)
        else:
            reference_here = reference
        assert pixels.shape == (60, 80, 3) and np.abs(pixels - reference_here).mean() < 8, sample.key


@pytest.mark.parametrize("field", ["max_file_bytes", "max_pixels"])
def test_caps_beyond_what_readers_take_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ShardConfig.parse({"name": "a", "source": "b", field: 2**40})


@pytest.mark.parametrize("kind", ["official", "folder", "parquet"])
def test_any_file_system_of_fsspec_is_a_source(tmp_path: Path, kind: str) -> None:
    source, root = tmp_path / "in", f"memory://{tmp_path.name}-{kind}"
    source.mkdir()
    if kind == "official":
        official(source)
    elif kind == "folder":
        for wnid in WNIDS:
            (source / wnid).mkdir()
            for name, data in class_images(wnid):
                (source / wnid / name).write_bytes(data)
    else:
        rows = [(data, None, label) for label, wnid in enumerate(WNIDS) for _, data in class_images(wnid)]
        write_parquet(source / "train-00000-of-00001.parquet", rows, list(WNIDS))
    memory = fsspec.filesystem("memory")
    for path in source.rglob("*"):
        if path.is_file():
            memory.pipe_file(
                f"/{tmp_path.name}-{kind}/{path.relative_to(source).as_posix()}", path.read_bytes()
            )
    try:
        there = shard_folder(root, tmp_path / "out", shard_samples=5)  # type: ignore[arg-type]
    finally:
        memory.rm(f"/{tmp_path.name}-{kind}", recursive=True)
    here = shard_folder(source, tmp_path / "here", shard_samples=5)
    assert there.fingerprint == here.fingerprint and contents(there) == contents(here)


def test_quality_without_max_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="set max_side too"):
        ShardConfig.parse({"name": "a", "source": "b", "quality": 90})


def test_webdataset_reads_every_layouts_shards(tmp_path: Path) -> None:
    ref = shard_folder(official(tmp_path / "in"), tmp_path / "out", shard_samples=5)
    manifest = load_manifest(ref.manifest)
    for name, split in manifest.splits.items():
        seen = {}
        for shard in split.shards:
            for sample in wds.WebDataset(resolve(ref.manifest, manifest, shard.path), shardshuffle=False):
                seen[sample["__key__"]] = ("jpg", sample["jpg"], int(sample["cls"]))
        assert seen == contents(ref)[name]
