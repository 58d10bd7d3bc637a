"""The shard stage: every layout gives the same shards, reruns write what is missing, bad input is named."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from cluster.errors import ConfigError, DataInvalid
from cluster.executor import LocalExecutor
from cluster.resources import Resources
from stages.artifacts import DatasetRef
from stages.context import StageContext
from stages.data.manifest import load_manifest, resolve
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from tests.stages.images import jpeg, picture, shard_folder
from tests.stages.shard.archives import contents


def tar_of(folder: Path, out: Path, prefix: str = "") -> Path:
    with tarfile.open(out, "w") as tar:
        tar.add(folder, prefix or ".")
    return out


def zip_of(folder: Path, out: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(out, "w", compression) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return out


def shard_bytes(ref: DatasetRef) -> dict[str, bytes]:
    manifest = load_manifest(ref.manifest)
    return {
        shard.name: Path(resolve(ref.manifest, manifest, shard.path)).read_bytes()
        for split in manifest.splits.values()
        for shard in split.shards
    }


@pytest.mark.parametrize(
    "pack",
    [
        lambda folder, tmp: tar_of(folder, tmp / "a.tar"),
        lambda folder, tmp: tar_of(folder, tmp / "b.tar", "some-data-set-1.0"),
        lambda folder, tmp: zip_of(folder, tmp / "c.zip"),
        lambda folder, tmp: zip_of(folder, tmp / "d.zip", zipfile.ZIP_DEFLATED),
    ],
    ids=["tar", "tar with a folder around", "zip", "deflated zip"],
)
def test_every_layout_gives_the_same_shards(
    image_folder: Path, tiny_dataset: DatasetRef, tmp_path: Path, pack: Callable[[Path, Path], Path]
) -> None:
    ref = shard_folder(pack(image_folder, tmp_path), tmp_path / "out", shard_samples=8)
    assert shard_bytes(ref) == shard_bytes(tiny_dataset)
    assert ref.fingerprint == tiny_dataset.fingerprint
    assert ref.splits == {"train": 30, "val": 12} and ref.num_classes == 3


def test_two_workers_write_the_same_bytes_as_one(
    image_folder: Path, tiny_dataset: DatasetRef, tmp_path: Path
) -> None:
    context = StageContext(out=str(tmp_path), executor=LocalExecutor(), resources=Resources(workers=2))
    outcome = run(ShardConfig(name="tiny", source=str(image_folder), shard_samples=8), {}, context)
    assert isinstance(outcome.artifact, DatasetRef)
    assert shard_bytes(outcome.artifact) == shard_bytes(tiny_dataset)


class Twenty:
    """Twenty workers at once, whose results come in the order in which they end."""

    def map(self, fn, items, resources):  # type: ignore[no-untyped-def]
        with ThreadPoolExecutor(resources.workers) as pool:
            yield from (job.result() for job in as_completed([pool.submit(fn, item) for item in items]))


def test_twenty_workers_write_the_same_bytes_as_one(image_folder: Path, tmp_path: Path) -> None:
    one = shard_folder(image_folder, tmp_path / "one", shard_samples=2)
    context = StageContext(out=str(tmp_path / "twenty"), executor=Twenty(), resources=Resources(workers=20))  # type: ignore[arg-type]
    outcome = run(ShardConfig(name="tiny", source=str(image_folder), shard_samples=2), {}, context)
    assert isinstance(outcome.artifact, DatasetRef)
    written = shard_bytes(outcome.artifact)
    assert len(written) > 20 and written == shard_bytes(one)
    assert outcome.artifact.fingerprint == one.fingerprint


def test_webdataset_reads_what_the_source_holds(image_folder: Path, tiny_dataset: DatasetRef) -> None:
    manifest = load_manifest(tiny_dataset.manifest)
    seen = {}
    for shard in manifest.splits["train"].shards:
        path = resolve(tiny_dataset.manifest, manifest, shard.path)
        for sample in wds.WebDataset(path, shardshuffle=False):
            seen[sample["__key__"]] = (sample["jpg"], int(sample["cls"]))
    expected = {
        f"class_{c}/img_{i}": ((image_folder / f"train/class_{c}/img_{i}.jpg").read_bytes(), c)
        for c in range(3)
        for i in range(10)
    }
    assert seen == expected


def test_index_rows_point_at_the_image_bytes(image_folder: Path, tiny_dataset: DatasetRef) -> None:
    manifest = load_manifest(tiny_dataset.manifest)
    split = manifest.splits["val"]
    rows = pq.read_table(resolve(tiny_dataset.manifest, manifest, split.index.path)).to_pylist()
    assert len(rows) == 12
    for row in rows:
        shard = Path(resolve(tiny_dataset.manifest, manifest, split.shards[row["shard"]].path)).read_bytes()
        data = shard[row["offset"] : row["offset"] + row["size"]]
        assert data == (image_folder / "val" / f"{row['key']}.jpg").read_bytes()
        assert row["label"] == int(row["key"][6])


def test_shards_mix_the_classes(tiny_dataset: DatasetRef) -> None:
    manifest = load_manifest(tiny_dataset.manifest)
    rows = pq.read_table(
        resolve(tiny_dataset.manifest, manifest, manifest.splits["train"].index.path)
    ).to_pylist()
    for shard in range(4):
        assert len({row["label"] for row in rows if row["shard"] == shard}) > 1


def test_a_rerun_writes_only_what_is_missing(image_folder: Path, tmp_path: Path) -> None:
    whole = shard_folder(image_folder, tmp_path / "whole", shard_samples=8)
    ref = shard_folder(image_folder, tmp_path / "out", shard_samples=8)
    first = Path(ref.manifest).parent
    next((tmp_path / "out/parts").glob("*/train-000001.json")).unlink()
    (first / "train-000001.tar").unlink()
    again = shard_folder(image_folder, tmp_path / "out", shard_samples=8)
    assert shard_bytes(again) == shard_bytes(whole)
    assert [path.name for path in sorted(Path(again.manifest).parent.glob("*.tar"))] == ["train-000001.tar"]
    assert again.fingerprint == ref.fingerprint


def test_a_shard_whose_tar_is_gone_or_cut_is_written_again(image_folder: Path, tmp_path: Path) -> None:
    whole = shard_folder(image_folder, tmp_path / "out", shard_samples=8)
    expected, folder = shard_bytes(whole), Path(whole.manifest).parent
    (folder / "train-000001.tar").unlink()
    (folder / "val-000000.tar").write_bytes(b"cut short")
    again = shard_folder(image_folder, tmp_path / "out", shard_samples=8)
    assert shard_bytes(again) == expected and again.fingerprint == whole.fingerprint
    written = {path.name for path in Path(again.manifest).parent.glob("*.tar")}
    assert written == {"train-000001.tar", "val-000000.tar"}


def test_an_image_mended_at_its_size_is_taken_on_the_next_run(image_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    images = [source / f"train/class_1/img_{i}.jpg" for i in (2, 5)]
    intact = [path.read_bytes() for path in images]
    for path in images:
        path.write_bytes(b"x" * path.stat().st_size)
    for path, data in zip(images, intact, strict=True):
        with pytest.raises(DataInvalid, match=r"max_bad_fraction") as caught:
            shard_folder(source, tmp_path / "out", shard_samples=100)
        assert path.name in str(caught.value)
        path.write_bytes(data)
    ref = shard_folder(source, tmp_path / "out", shard_samples=100)
    assert shard_bytes(ref) == shard_bytes(shard_folder(image_folder, tmp_path / "whole", shard_samples=100))


def test_images_that_stay_broken_do_not_have_their_shard_written_again(
    image_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    (source / "train/class_1/img_2.jpg").write_bytes(b"x")
    first = shard_folder(source, tmp_path / "out", max_bad_fraction=0.1)
    again = shard_folder(source, tmp_path / "out", max_bad_fraction=0.1)
    assert again.fingerprint == first.fingerprint
    assert not list(Path(again.manifest).parent.glob("*.tar"))


def test_a_folder_that_may_not_be_listed_is_named(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("train/class_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # tests may run as root, whom no mode keeps out
    with pytest.raises(DataInvalid, match=r"train/class_1 cannot be listed"):
        shard_folder(image_folder, tmp_path / "out")


def test_a_listing_of_archives_names_a_folder_that_may_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **options: Any) -> Any:
        options["onerror"](PermissionError(13, "Permission denied", "/x/inner"))
        return iter(())

    monkeypatch.setattr(os, "walk", refuse)
    with pytest.raises(DataInvalid, match="/x/inner cannot be listed"):
        shard_folder(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: (folder / "a.jpg").symlink_to("nowhere"), "cannot be looked at"),
        (lambda folder: os.mkfifo(folder / "a.jpg"), "named like an image, but is no file"),
        (lambda folder: Path(os.fsdecode(bytes(folder) + b"/\xff.jpg")).write_bytes(b"x"), "not UTF-8"),
    ],
    ids=["dangling link", "pipe", "name"],
)
def test_what_is_no_image_file_is_named(image_folder: Path, tmp_path: Path, make, match: str) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    make(source / "train/class_0")
    with pytest.raises(DataInvalid, match=match):
        shard_folder(source, tmp_path / "out")


def test_a_dangling_link_that_is_named_like_no_image_is_ignored(image_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    (source / "train/class_0/notes").symlink_to("nowhere")
    assert shard_folder(source, tmp_path / "out").splits["train"] == 30


def test_a_name_in_a_tar_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("c/\xe9.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DataInvalid, match="not UTF-8"):
        shard_folder(tmp_path / "a.tar", tmp_path / "out")


def test_keys_that_repeat_pass_over_names_that_are_taken(image_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    images = {f"a{rest}.jpg": jpeg(picture(i)) for i, rest in enumerate(("", "~2", "~2~2"))}
    images |= {"a.jpeg": jpeg(picture(7)), "a~2.jpeg": jpeg(picture(8)), "a.JPG": jpeg(picture(9))}
    for name, data in images.items():
        (source / "train/class_0" / name).write_bytes(data)
    found = contents(shard_folder(source, tmp_path / "out"))["train"]
    assert len(found) == 36
    ours = {key: data for key, (_, data, _) in found.items() if key.startswith("class_0/a")}
    assert sorted(ours.values()) == sorted(images.values())
    assert set(ours) == {f"class_0/a{rest}" for rest in ("", "~2", "~3", "~4", "~2~2", "~2~3")}


def test_a_mended_source_is_sharded_anew(image_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(image_folder, tmp_path / "in")
    bad = broken / "train/class_1/img_2.jpg"
    bad.write_bytes(b"not an image")
    with pytest.raises(DataInvalid, match="max_bad_fraction"):
        shard_folder(broken, tmp_path / "out")
    bad.unlink()
    assert shard_folder(broken, tmp_path / "out").splits["train"] == 29
    assert shard_folder(image_folder, tmp_path / "out").splits["train"] == 30


def test_shards_can_be_cut_by_bytes(image_folder: Path, tmp_path: Path) -> None:
    ref = shard_folder(image_folder, tmp_path / "out", shard_bytes=2**16)
    shards = load_manifest(ref.manifest).splits["train"].shards
    assert len(shards) > 1 and sum(shard.samples for shard in shards) == 30
    assert max(shard.bytes for shard in shards) < 2**16 + 4096


def test_a_broken_image_stops_with_its_name(image_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(image_folder, tmp_path / "in")
    (broken / "train/class_1/img_2.jpg").write_bytes(b"not an image")
    with pytest.raises(DataInvalid, match=r"train/class_1/img_2.jpg: neither JPEG nor PNG") as caught:
        shard_folder(broken, tmp_path / "out")
    assert caught.value.exit_code == 5 and "max_bad_fraction" in str(caught.value)


def test_broken_images_within_the_limit_are_left_out_and_listed(image_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(image_folder, tmp_path / "in")
    whole = jpeg(picture(1, height=200, width=300))
    (broken / "train/class_1/img_2.jpg").write_bytes(whole[: len(whole) // 2])  # its header is fine
    header = shard_folder(broken, tmp_path / "header")
    assert header.splits["train"] == 30
    ref = shard_folder(broken, tmp_path / "decode", verify="decode", max_bad_fraction=0.1)
    manifest = load_manifest(ref.manifest)
    assert ref.splits["train"] == 29 and sum(s.samples for s in manifest.splits["train"].shards) == 29
    assert [(item.split, item.source) for item in manifest.skipped] == [("train", "train/class_1/img_2.jpg")]
    assert "does not decode" in manifest.skipped[0].reason


def test_oddities_of_imagenet_are_kept(image_folder: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(image_folder, tmp_path / "in")
    png = io.BytesIO()
    picture(5).save(png, "PNG")
    (odd / "train/class_0/n1.JPEG").write_bytes(png.getvalue())  # a PNG named .JPEG
    (odd / "train/class_0/n2.JPEG").write_bytes(jpeg(picture(6).convert("CMYK")))
    (odd / "train/class_0/n3.x.JPEG").write_bytes(jpeg(picture(7).convert("L")))
    (odd / "train/class_0/n3_x.jpg").write_bytes(jpeg(picture(8)))
    ref = shard_folder(odd, tmp_path / "out", verify="decode", shard_samples=100)
    with tarfile.open(fileobj=io.BytesIO(shard_bytes(ref)["train-000000"])) as tar:
        names = set(tar.getnames())
    assert {
        f"class_0/{name}" for name in ("n1.png", "n2.jpg", "n3_x.jpg", "n3_x~2.jpg", "n3_x~2.cls")
    } <= names


def test_names_too_long_for_tar_are_replaced_by_a_hash(image_folder: Path, tmp_path: Path) -> None:
    long = shutil.copytree(image_folder, tmp_path / "in")
    (long / "train/class_0" / ("x" * 150 + ".jpg")).write_bytes(jpeg(picture(9)))
    assert shard_folder(long, tmp_path / "out").splits["train"] == 31


def _member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
        return path

    return build


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (_member("/train/a/x.jpg", data=b"x"), "unsafe path"),
        (_member("train/../../x.jpg", data=b"x"), "unsafe path"),
        (_member("train/a/x.jpg", tarfile.SYMTYPE), "neither a file nor a folder"),
        (_member("train/a/x.jpg", tarfile.LNKTYPE), "neither a file nor a folder"),
        (_member("train/a/x.jpg", tarfile.CHRTYPE), "neither a file nor a folder"),
        (_member("train/a/x.txt", data=b"x"), "holds no image"),
        (_member("x.jpg", data=b"x"), "none in a class folder"),
    ],
)
def test_archives_with_foreign_members_are_refused(
    tmp_path: Path, build: Callable[[Path], Path], match: str
) -> None:
    with pytest.raises(DataInvalid, match=match):
        shard_folder(build(tmp_path / "a.tar"), tmp_path / "out")


def test_a_tar_cut_short_is_refused(image_folder: Path, tmp_path: Path) -> None:
    archive = tar_of(image_folder, tmp_path / "a.tar")
    whole = archive.read_bytes()
    for length in (len(whole) // 2, len(whole) // 2 // 512 * 512):
        archive.write_bytes(whole[:length])
        with pytest.raises(DataInvalid, match=r"cut short|not a readable tar"):
            shard_folder(archive, tmp_path / "out")
    with tarfile.open(archive.with_name("b.tar"), "w") as tar:
        tar.add(image_folder, ".")
        header = tar.getmembers()[20].offset
    archive.write_bytes(whole[:header] + b"?" * 512 + whole[header + 512 :])
    with pytest.raises(DataInvalid, match=r"damaged|not a readable tar"):
        shard_folder(archive, tmp_path / "out")


def test_a_compressed_tar_is_refused_with_the_tool_to_use(image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(image_folder, ".")
    with pytest.raises(ConfigError, match="gunzip"):
        shard_folder(tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="nowhere does not exist"):
        shard_folder(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    "pack", [lambda f, t: f, lambda f, t: tar_of(f, t / "a.tar"), lambda f, t: zip_of(f, t / "a.zip")]
)
def test_a_class_folder_with_no_image_is_named(
    image_folder: Path, tmp_path: Path, pack: Callable[[Path, Path], Path]
) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    (source / "train/class_9").mkdir()
    with pytest.raises(DataInvalid, match=r"class folder\(s\) with no image: train/class_9"):
        shard_folder(pack(source, tmp_path), tmp_path / "out")


def test_a_class_folder_holding_other_files_only_is_named(image_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    (source / "train/class_9").mkdir()
    (source / "train/class_9/notes.txt").write_text("no image")
    with pytest.raises(DataInvalid, match="train/class_9"):
        shard_folder(source, tmp_path / "out")


def test_a_val_class_that_train_lacks_is_named(image_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    shutil.copytree(source / "val/class_0", source / "val/class_x")
    with pytest.raises(DataInvalid, match="'class_x'"):
        shard_folder(source, tmp_path / "out")


def test_the_manifest_states_everything(tiny_dataset: DatasetRef) -> None:
    content = json.loads(Path(tiny_dataset.manifest).read_text())
    assert [item["wnid"] for item in content["classes"]] == ["class_0", "class_1", "class_2"]
    assert [item["samples"] for item in content["splits"]["train"]["shards"]] == [8, 8, 7, 7]
    assert content["source"]["entries"] == 42 and content["skipped"] == [] and content["seed"] == 0
