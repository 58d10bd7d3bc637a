"""The manifest of a sharded data set and its sample index: what the shard stage writes and readers open.

The manifest is one JSON object; paths in it are relative to the data set's root, which `root` names
relative to the manifest's own folder, so that a data set can be copied as a whole. Beside it lies one
parquet index per split with a row for each sample, in shard order: sample id = row number.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from cluster.errors import DataInvalid

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),  # position in the split's shard list
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("size", pa.int64()),  # bytes of the image
        ("key", pa.string()),
        ("label", pa.int32()),
    ]
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One tar file."""

    name: str
    path: str
    samples: int
    bytes: int
    sha256: str


class ClassInfo(_Record):
    """One class: its label, its folder name (the WordNet id in ImageNet), a name for people."""

    index: int
    wnid: str
    name: str


class IndexFile(_Record):
    """The parquet index of one split."""

    path: str
    bytes: int
    sha256: str


class Split(_Record):
    """The shards of one split and the index over them."""

    samples: int
    bytes: int
    index: IndexFile
    shards: list[Shard]


class Skipped(_Record):
    """A source image that is not in the data set, and why."""

    split: str
    source: str
    reason: str


class Source(_Record):
    """What was read: layout, entries, and a fingerprint over the names and sizes of all entries."""

    layout: str
    entries: int
    ignored: int
    fingerprint: str


class Manifest(_Record):
    """A sharded data set. `fingerprint` depends on content alone: shards' bytes, classes, splits."""

    format: Literal["itpn-shards/1"] = "itpn-shards/1"
    name: str
    root: str
    fingerprint: str
    seed: int
    source: Source
    classes: list[ClassInfo]
    splits: dict[str, Split]
    skipped: list[Skipped]


def content_fingerprint(classes: list[ClassInfo], splits: dict[str, list[Shard]]) -> str:
    """sha256 over the classes and every shard's hash, in order; the same on any store and worker count."""
    content = {
        "classes": [[c.index, c.wnid] for c in classes],
        "splits": {name: [shard.sha256 for shard in shards] for name, shards in sorted(splits.items())},
    }
    return hashlib.sha256(storage.canonical_json(content)).hexdigest()


def load_manifest(uri: str) -> Manifest:
    """Read and check a manifest; raises DataInvalid when it is missing or not one."""
    try:
        data = storage.read_json(uri)
    except FileNotFoundError:
        raise DataInvalid(
            f"there is no data set manifest at {uri}", remedy="run the shard stage, or correct the path"
        ) from None
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise DataInvalid(
            f"{uri} is not a data set manifest of this version",
            expected="format itpn-shards/1",
            found=f"{error.error_count()} wrong fields, the first: {error.errors()[0]['loc']}",
            remedy="shard the data again with this version of the code",
        ) from None


def resolve(manifest_uri: str, manifest: Manifest, path: str) -> str:
    """The URI of a file that the manifest names."""
    folder = manifest_uri.rsplit("/", 1)[0]
    for part in manifest.root.split("/"):
        folder = folder.rsplit("/", 1)[0] if part == ".." else folder if part == "." else f"{folder}/{part}"
    return storage.join(folder, path)
