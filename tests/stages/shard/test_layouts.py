"""Every layout in which people have images gives the keys, labels and bytes of its source."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from cluster.resources import Resources
from stages.artifacts import DatasetRef
from stages.context import StageContext
from stages.data.manifest import load_manifest, resolve
from stages.shard.config import ShardConfig
from stages.shard.index import build_index
from stages.shard.plan import plan_shards
from stages.shard.source import open_source
from stages.shard.stage import run
from tests.stages.images import jpeg, picture, shard_folder
from tests.stages.shard.archives import (
    LABEL_OF,
    META_MAT,
    VAL_CLASSES,
    WNIDS,
    class_images,
    contents,
    devkit,
    official,
    tar_bytes,
    train_tar,
    val_images,
    write_parquet,
)

TRAIN = {
    f"{wnid}/{name[:-5]}": ("jpg", data, label)
    for label, wnid in enumerate(WNIDS)
    for name, data in class_images(wnid)
}
VAL = {
    f"{WNIDS[LABEL_OF[number]]}/{name[:-5]}": ("jpg", data, LABEL_OF[number])
    for (name, data), number in zip(val_images(), VAL_CLASSES, strict=True)
}


def test_the_official_archives(tmp_path: Path) -> None:
    ref = shard_folder(official(tmp_path / "in"), tmp_path / "out", shard_samples=5)
    assert contents(ref) == {"train": TRAIN, "val": VAL}
    manifest = load_manifest(ref.manifest)
    assert [item.wnid for item in manifest.classes] == list(WNIDS)
    assert manifest.classes[0].name == "tench, Tinca tinca"
    assert manifest.source.layout == "ilsvrc2012"


def test_the_official_archives_listed_by_two_workers_give_the_same(tmp_path: Path) -> None:
    source = official(tmp_path / "in")
    context = StageContext(out=str(tmp_path / "two"), resources=Resources(workers=2))
    ref = run(ShardConfig(name="tiny", source=str(source), shard_samples=5), {}, context).artifact
    assert isinstance(ref, DatasetRef)
    assert ref.fingerprint == shard_folder(source, tmp_path / "one", shard_samples=5).fingerprint


def test_the_official_train_tar_alone(tmp_path: Path) -> None:
    tar = train_tar(tmp_path / "ILSVRC2012_img_train.tar")
    assert contents(shard_folder(tar, tmp_path / "out")) == {"train": TRAIN}


def test_a_val_sorted_into_folders_beside_the_official_train_tar(tmp_path: Path) -> None:
    source = official(tmp_path / "in")
    (source / "ILSVRC2012_img_val.tar").unlink()
    for (name, data), number in zip(val_images(), VAL_CLASSES, strict=True):
        folder = source / "val" / WNIDS[LABEL_OF[number]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert contents(shard_folder(source, tmp_path / "out")) == {"train": TRAIN, "val": VAL}


def _unpacked(folder: Path) -> None:
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz") as devkit:
        for member in filter(tarfile.TarInfo.isfile, devkit):
            (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / member.name).write_bytes(devkit.extractfile(member).read())


def _csv(folder: Path) -> None:
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[LABEL_OF[n]]} 1 2 3 4 " for i, n in enumerate(VAL_CLASSES, 1)]
    text = "\n".join(["ImageId,PredictionString", *reversed(rows)])
    (folder / "LOC_val_solution.csv").write_text(text + "\n")


def _lines(folder: Path) -> None:
    text = "".join(f"{WNIDS[LABEL_OF[number]]}\n" for number in VAL_CLASSES)
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text(text)


@pytest.mark.parametrize("write", [_unpacked, _csv, _lines])
def test_val_labels_in_the_other_forms_that_people_have(tmp_path: Path, write) -> None:
    source = official(tmp_path / "in")
    write(source)
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert contents(shard_folder(source, tmp_path / "out"))["val"] == VAL


def test_kaggles_loose_validation_images_are_sorted_by_their_labels(tmp_path: Path) -> None:
    source = tmp_path / "Data"
    for wnid in WNIDS:
        (source / "train" / wnid).mkdir(parents=True)
        for name, data in class_images(wnid):
            (source / "train" / wnid / name).write_bytes(data)
    (source / "val").mkdir()
    for name, data in val_images():
        (source / "val" / name).write_bytes(data)
    _csv(tmp_path)
    ref = shard_folder(source, tmp_path / "out", val_labels=str(tmp_path / "LOC_val_solution.csv"))
    assert contents(ref) == {"train": TRAIN, "val": VAL}


def test_validation_images_without_labels_say_what_is_missing(tmp_path: Path) -> None:
    source = official(tmp_path / "in")
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(DataInvalid, match="devkit_t12"):
        shard_folder(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("truth", "meta", "match"),
    [
        ((2, 1, 3), None, "val_00000004.JPEG has no label"),
        ((2, 1, 3, 77), None, "class numbers"),
        (VAL_CLASSES, META_MAT.read_bytes()[:200], "meta.mat"),
        (VAL_CLASSES, b"no mat", "meta.mat"),
    ],
)
def test_a_devkit_that_does_not_fit_is_named(tmp_path: Path, truth, meta, match: str) -> None:
    source = official(tmp_path / "in")
    devkit(source / "ILSVRC2012_devkit_t12.tar.gz", truth, meta)
    with pytest.raises(DataInvalid, match=match):
        shard_folder(source, tmp_path / "out")


def test_a_tar_per_synset(tmp_path: Path) -> None:
    """ImageNet-21K, and what `tar xf ILSVRC2012_img_train.tar` leaves behind."""
    for place in ("", "train/"):
        source = tmp_path / f"in{len(place)}"
        (source / place).mkdir(parents=True)
        for wnid in WNIDS:
            (source / place / f"{wnid}.tar").write_bytes(tar_bytes(class_images(wnid)))
        assert contents(shard_folder(source, tmp_path / f"out{len(place)}")) == {"train": TRAIN}


def test_a_folder_of_one_archive_per_split(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    images = [(f"{w}/{name}", data) for w in WNIDS for name, data in class_images(w)]
    (source / "train.tar").write_bytes(tar_bytes(images))
    (source / "val.tar").write_bytes(tar_bytes(images[:1] + images[7:8]))
    found = contents(shard_folder(source, tmp_path / "out"))
    assert found["train"] == TRAIN and len(found["val"]) == 2


def test_a_class_tar_cut_short_or_with_a_link_is_refused(tmp_path: Path) -> None:
    inner = tar_bytes(class_images(WNIDS[0]))
    outer = tmp_path / "ILSVRC2012_img_train.tar"
    outer.write_bytes(tar_bytes([(f"{WNIDS[0]}.tar", inner[:-10240])]))
    with pytest.raises(DataInvalid, match=rf"{WNIDS[0]}.tar inside .* is damaged or cut short"):
        shard_folder(outer, tmp_path / "out")
    outer.write_bytes(tar_bytes([("a.tar", inner), ("readme.txt", b"x")]))
    with pytest.raises(DataInvalid, match="a tar of tars, but holds"):
        shard_folder(outer, tmp_path / "out")


ROWS = [(jpeg(picture(i)), f"img_{i}.JPEG" if i % 2 else None, i % 3) for i in range(22)]


def _parquet(folder: Path) -> Path:
    names = ["tench, Tinca tinca", "goldfish", "fox"]
    write_parquet(folder / "data/train-00000-of-00002.parquet", ROWS[:10], names)
    write_parquet(folder / "data/train-00001-of-00002.parquet", ROWS[10:18], names)
    write_parquet(folder / "data/validation-00000-of-00001.parquet", ROWS[18:], names)
    write_parquet(folder / "data/test-00000-of-00001.parquet", [(ROWS[0][0], None, -1)], names)
    return folder


@pytest.mark.parametrize("blocks", [None, 1, 2, 4])
def test_parquet_as_hugging_face_writes_it(tmp_path: Path, blocks: int | None) -> None:
    ref = shard_folder(_parquet(tmp_path / "in"), tmp_path / "out", shard_samples=6, parquet_blocks=blocks)
    found = contents(ref)
    by_bytes = {data: label for data, _, label in ROWS}
    for split, rows in (("train", ROWS[:18]), ("val", ROWS[18:])):
        assert {image: label for _, image, label in found[split].values()} == {
            data: by_bytes[data] for data, *_ in rows
        }
    assert {"img_1", "train-00000-of-00002/00000000"} <= set(found["train"])
    manifest = load_manifest(ref.manifest)
    assert [item.name for item in manifest.classes] == ["tench, Tinca tinca", "goldfish", "fox"]
    assert manifest.source.ignored == 1  # the test set was not asked for


@pytest.mark.parametrize(("ordered", "least", "row_groups"), [(True, 14, 200), (False, 10, 2)])
def test_shards_of_parquet_hold_many_classes_and_of_shuffled_rows_few_row_groups(
    tmp_path: Path, ordered: bool, least: int, row_groups: int
) -> None:
    labels = np.repeat(np.arange(20), 100)  # sorted by class, as a folder is converted
    if not ordered:
        np.random.default_rng(0).shuffle(labels)
    image = jpeg(picture(1, height=8, width=8))
    source = write_parquet(
        tmp_path / "a.parquet",
        [(image, None, int(label)) for label in labels],
        [str(i) for i in range(20)],
        100,
    )
    config = ShardConfig(name="a", source=str(source), shard_samples=200)
    opened = open_source(config.source, config.splits)
    index = build_index(opened.listings(StageContext(out=str(tmp_path))), config.splits, uri=opened.uri)
    for shard in plan_shards(index, opened, config):
        assert len(np.unique(index.labels[shard.rows])) >= least
        assert len(np.unique(np.asarray(index.table.aux)[shard.rows])) <= row_groups


def test_parquet_that_holds_no_labelled_images_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"url": ["http://x"], "label": [1]}), path)
    with pytest.raises(DataInvalid, match="url: string"):
        shard_folder(path, tmp_path / "out")
    write_parquet(path, [(ROWS[0][0], None, -1)], ["a"])
    with pytest.raises(DataInvalid, match="without a label"):
        shard_folder(path, tmp_path / "out")
    write_parquet(path, [(ROWS[0][0], None, 2**40)], ["a"])
    with pytest.raises(DataInvalid, match="no class number"):
        shard_folder(path, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataInvalid, match="not a readable Parquet"):
        shard_folder(path, tmp_path / "out")


def test_a_parquet_row_without_bytes_counts_as_broken(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*ROWS[:9], (None, "gone.jpg", 1)], ["a", "b", "c"])
    ref = shard_folder(path, tmp_path / "out", max_bad_fraction=0.2)
    assert [item.reason for item in load_manifest(ref.manifest).skipped] == ["no bytes in this row"]
    assert ref.splits == {"train": 9}


def _webdataset(folder: Path, names: str) -> Path:
    folder.mkdir()
    for shard in range(3):
        with wds.ShardWriter(str(folder / names.replace("#", str(shard))) + "%0d", verbose=0) as writer:
            for i in range(shard, 12, 3):
                writer.write({"__key__": f"key_{i:03d}", "jpg": jpeg(picture(i)), "cls": str(i % 4)})
    for path in folder.iterdir():
        path.rename(path.with_name(path.name[:-1]))
    return folder


def test_webdataset_tars_are_sharded_again(tmp_path: Path) -> None:
    source = _webdataset(tmp_path / "in", "imagenet-train-#.tar")
    found = contents(shard_folder(source, tmp_path / "out", shard_samples=5))
    assert found == {"train": {f"key_{i:03d}": ("jpg", jpeg(picture(i)), i % 4) for i in range(12)}}


def test_our_own_shards_keep_their_class_names_when_sharded_again(
    tiny_dataset: DatasetRef, tmp_path: Path
) -> None:
    ref = shard_folder(Path(tiny_dataset.manifest).parent, tmp_path / "out", shard_samples=5)
    assert contents(ref) == contents(tiny_dataset)
    assert [c.wnid for c in load_manifest(ref.manifest).classes] == ["class_0", "class_1", "class_2"]


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x")], "'b.jpg' has no label"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "a second image"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "no class number"),
        ([("a.jpg", b"x"), ("a.cls", b"300000000")], "no class number"),
    ],
)
def test_webdataset_tars_that_are_not_labelled_images_are_named(tmp_path: Path, members, match: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DataInvalid, match=match):
        shard_folder(tmp_path / "a.tar", tmp_path / "out")


def test_labelled_samples_beside_class_folders_are_refused(tmp_path: Path) -> None:
    source = _webdataset(tmp_path / "in", "train-#.tar")
    (source / "n01440764.tar").write_bytes(tar_bytes(class_images(WNIDS[0])))
    with pytest.raises(DataInvalid, match="mixes samples"):
        shard_folder(source, tmp_path / "out")


def test_archives_compressed_as_a_whole_are_refused(tmp_path: Path) -> None:
    source = official(tmp_path / "in")
    (source / "ILSVRC2012_img_val.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ConfigError, match="gunzip"):
        shard_folder(source, tmp_path / "out")


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "store"])
def test_archives_beside_class_folders_are_refused(
    image_folder: Path, moto_root: str, tmp_path: Path, remote
) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    with zipfile.ZipFile(source / "notes.zip", "w") as archive:
        archive.writestr("extra/one.jpg", jpeg(picture(1)))
    if remote:
        storage.upload_tree(source, f"{moto_root}/in")
    with pytest.raises(DataInvalid, match=r"archives and loose images: 'notes.zip', and 'train/class_0"):
        shard_folder(f"{moto_root}/in" if remote else source, tmp_path / "out")  # type: ignore[arg-type]


def test_a_split_beside_its_own_archive_is_refused(tmp_path: Path) -> None:
    source = official(tmp_path / "in")
    (source / "train" / WNIDS[0]).mkdir(parents=True)
    (source / "train" / WNIDS[0] / "a.jpg").write_bytes(jpeg(picture(1)))
    with pytest.raises(DataInvalid, match="archives and loose images"):
        shard_folder(source, tmp_path / "out")


def test_images_of_a_split_that_is_not_asked_for_may_lie_beside_archives(tmp_path: Path) -> None:
    source = official(tmp_path / "in")
    (source / "test").mkdir()
    (source / "test/a.jpg").write_bytes(jpeg(picture(1)))
    assert contents(shard_folder(source, tmp_path / "out")) == {"train": TRAIN, "val": VAL}


@pytest.mark.parametrize("folder", ["", "ILSVRC2012_img_val/", "./val/"])
def test_a_val_tar_may_have_a_folder_around_its_images(tmp_path: Path, folder: str) -> None:
    source = official(tmp_path / "in")
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes((folder + n, d) for n, d in val_images()))
    assert contents(shard_folder(source, tmp_path / "out")) == {"train": TRAIN, "val": VAL}
    alone = shard_folder(source / "ILSVRC2012_img_val.tar", tmp_path / "alone")
    found = contents(alone)["val"]
    assert {key: data for key, (_, data, _) in found.items()} == {k: d for k, (_, d, _) in VAL.items()}


def test_tars_of_captioned_images_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for shard in range(2):
        members = [(f"{shard:05d}{i:04d}.{end}", b"x") for i in range(2) for end in ("jpg", "json", "txt")]
        (source / f"{shard:05d}.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DataInvalid, match="samples without a class"):
        shard_folder(source, tmp_path / "out")


def test_a_zip_made_on_a_mac_is_read_without_its_resource_forks(image_folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(image_folder.rglob("*.jpg")):
            name = path.relative_to(image_folder).as_posix()
            archive.write(path, name)
            archive.writestr(f"__MACOSX/{Path(name).parent}/._{path.name}", b"fork")
        archive.mkdir("__MACOSX/train/class_x")
    ref = shard_folder(tmp_path / "a.zip", tmp_path / "out")
    assert contents(ref) == contents(shard_folder(image_folder, tmp_path / "plain"))


def test_our_own_output_folder_gives_what_its_manifest_names_and_no_more(
    image_folder: Path, tmp_path: Path
) -> None:
    ref = shard_folder(image_folder, tmp_path / "own", shard_samples=8)
    dead = tmp_path / "own/attempts/dead/train-000000.tar"
    dead.parent.mkdir()
    shutil.copy(Path(ref.manifest).with_name("train-000000.tar"), dead)
    with pytest.raises(DataInvalid, match="has not finished"):
        shard_folder(tmp_path / "own", tmp_path / "out")
    record = {"artifact": ref.model_dump(mode="json")}
    (tmp_path / "own/record.json").write_text(json.dumps(record))
    assert contents(shard_folder(tmp_path / "own", tmp_path / "out")) == contents(ref)


def test_keys_that_webdataset_would_skip_are_altered(tmp_path: Path) -> None:
    for name in ("__background__/a.jpg", "_background__/a.jpg", "cat/b.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(jpeg(picture(len(name))))
    ref = shard_folder(tmp_path / "in", tmp_path / "out")
    manifest = load_manifest(ref.manifest)
    [shard] = manifest.splits["train"].shards
    path = resolve(ref.manifest, manifest, shard.path)
    keys = {sample["__key__"] for sample in wds.WebDataset(path, shardshuffle=False)}
    assert keys == {"_background__/a", "_background__/a~2", "cat/b"}
    assert [item.wnid for item in manifest.classes] == ["__background__", "_background__", "cat"]


def test_a_folder_named_validation_is_val(image_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(image_folder, tmp_path / "in")
    (source / "val").rename(source / "validation")
    assert contents(shard_folder(source, tmp_path / "out")) == contents(
        shard_folder(image_folder, tmp_path / "o")
    )


def test_a_class_that_bears_the_name_of_a_split_is_named(tmp_path: Path) -> None:
    for name in ("train", "car"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jpg").write_bytes(jpeg(picture(1)))
    with pytest.raises(DataInvalid, match="bears the name of a split, set `splits`"):
        shard_folder(tmp_path / "in", tmp_path / "out")
    ref = shard_folder(tmp_path / "in", tmp_path / "other", splits=("training", "val"))
    assert set(contents(ref)["training"]) == {"train/a", "car/a"}


def test_tars_joined_into_one_file_are_refused(tmp_path: Path) -> None:
    parts = [tar_bytes((f"c{i}/{name}", data) for name, data in class_images(WNIDS[i])) for i in range(2)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    with pytest.raises(DataInvalid, match="joined from several tars"):
        shard_folder(tmp_path / "a.tar", tmp_path / "out")


def test_a_zip_entry_with_a_wrong_checksum_counts_as_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in class_images(WNIDS[0]):
            archive.writestr(f"c/{name}", data)
    data = bytearray(path.read_bytes())
    image = class_images(WNIDS[0])[3][1]
    data[data.index(image) + len(image) // 2] ^= 1
    path.write_bytes(data)
    ref = shard_folder(path, tmp_path / "out", max_bad_fraction=0.5)
    [skipped] = load_manifest(ref.manifest).skipped
    assert "another checksum" in skipped.reason and ref.splits == {"train": 5}
