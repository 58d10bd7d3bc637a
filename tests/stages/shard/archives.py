"""Small real archives in the layouts that people have."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts import DatasetRef
from stages.data.manifest import load_manifest, resolve
from tests.stages.images import jpeg, picture

META_MAT = Path(__file__).parent / "data/meta.mat"  # written by scipy.io.savemat with the devkit's fields
WNIDS = ("n01440764", "n01443537", "n02119789")
LABEL_OF = {2: 0, 3: 1, 1: 2}  # ILSVRC2012_ID -> label: the devkit does not count in the order of the folders


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def class_images(wnid: str, count: int = 6) -> list[tuple[str, bytes]]:
    seed = 1000 * WNIDS.index(wnid)
    return [(f"{wnid}_{i}.JPEG", jpeg(picture(seed + i))) for i in range(count)]


def train_tar(path: Path) -> Path:
    """`ILSVRC2012_img_train.tar`: a tar of one tar for each class."""
    inner = [(f"{wnid}.tar", tar_bytes(class_images(wnid))) for wnid in reversed(WNIDS)]
    path.write_bytes(tar_bytes(inner))
    return path


VAL_CLASSES = (2, 1, 3, 1)  # ILSVRC2012_ID of validation images 1, 2, …


def val_images() -> list[tuple[str, bytes]]:
    return [(f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(picture(9000 + i))) for i in range(1, len(VAL_CLASSES) + 1)]


def devkit(path: Path, truth: Iterable[int] = VAL_CLASSES, meta: bytes | None = None) -> Path:
    """`ILSVRC2012_devkit_t12.tar.gz`, as much as is read of it."""
    lines = "".join(f"{number}\n" for number in truth).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (
            ("data/ILSVRC2012_validation_ground_truth.txt", lines),
            ("data/meta.mat", META_MAT.read_bytes() if meta is None else meta),
        ):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def official(folder: Path) -> Path:
    """The three files that ImageNet's page offers, in one folder."""
    folder.mkdir(exist_ok=True)
    train_tar(folder / "ILSVRC2012_img_train.tar")
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val_images()))
    devkit(folder / "ILSVRC2012_devkit_t12.tar.gz")
    return folder


def write_parquet(
    path: Path, rows: list[tuple[bytes | None, str | None, int]], names: list[str], group: int = 4
) -> Path:
    """One file as Hugging Face's `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.array(
        [{"bytes": data, "path": name} for data, name, _ in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"image": image, "label": pa.array([label for *_, label in rows], pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=group)
    return path


def contents(ref: DatasetRef) -> dict[str, dict[str, tuple[str, bytes, int]]]:
    """split -> key -> (suffix, image, label), read by `tarfile` from the shards."""
    manifest = load_manifest(ref.manifest)
    found: dict[str, dict[str, tuple[str, bytes, int]]] = {}
    for name, split in manifest.splits.items():
        found[name] = {}
        for shard in split.shards:
            with tarfile.open(resolve(ref.manifest, manifest, shard.path)) as tar:
                data = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for member, image in data.items():
                key, _, suffix = member.rpartition(".")
                if suffix != "cls":
                    assert key not in found[name]
                    found[name][key] = (suffix, image, int(data[f"{key}.cls"]))
    return found
