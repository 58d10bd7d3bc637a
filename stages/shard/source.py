"""What a source is, and everything in it. The layouts that are known, local or in an object store:

- ILSVRC2012 as it is downloaded: a folder with `ILSVRC2012_img_train.tar` (a tar of class tars),
  `ILSVRC2012_img_val.tar` and labels for it (stages/shard/truth.py), or `val/` sorted into class folders;
- an ImageFolder tree (`<split>/<class>/…` or `<class>/…`), a tar or zip of one, or a folder of such archives;
- ImageNet-21K: a tar for each synset, in a folder or inside one tar;
- Parquet files with image bytes and labels (Hugging Face);
- WebDataset tars (image + `.cls`), to shard again.

Archives in a folder belong to the split that their path names (`train/…`, `val-00000.tar`, …).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.context import StageContext
from stages.data.manifest import load_manifest, resolve
from stages.shard import truth
from stages.shard.listing import (
    CLASS,
    FOLDER,
    PARQUET,
    SAMPLES,
    SPLIT_WORDS,
    TAR,
    TREE,
    VAL,
    ZIP,
    Listing,
    Unit,
    is_image,
    local_path,
)
from stages.shard.scan import list_unit, list_units, refuse_unreadable
from stages.shard.tars import members, open_tar
from stages.shard.verify import manifest_of

_ARCHIVES = (".tar", ".zip", ".parquet")
_COMPRESSED = ((b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"), (b"(\xb5/\xfd", "unzstd"))
_DEPTH = 3  # folders below the source that may hold archives
_TASK_UNITS, _TASK_BYTES = 64, 4 << 30  # of one listing task


@dataclass
class Source:
    """A source that was looked at, not yet listed."""

    uri: str
    layout: str
    containers: list[str]  # the files that offsets are counted in
    units: list[Unit]
    splits: tuple[str, ...]
    val_labels: str | None
    ignored: int = 0  # archives of splits that were not asked for
    names: dict[str, str] = field(default_factory=dict)  # class folder -> name for people
    moved: dict[str, str] = field(default_factory=dict)  # path as listed -> where the file really is
    _truth: truth.GroundTruth | None = None

    def listings(self, context: StageContext) -> Iterator[Listing]:
        """All images, with paths `[split/]class/…/image` or, of kind `samples`, `[split]` in `unit["name"]`."""
        tasks = list(_tasks(self.units))
        if len(tasks) > 1 and context.resources.workers > 1:
            for found in context.executor.map(list_units, tasks, context.resources):
                yield from map(self._placed, found)
        else:
            for unit in self.units:
                yield from map(self._placed, list_unit(unit))

    def split_of(self, name: str) -> str | None:
        """The split that an archive's path names: one of `splits`, '' for none, None for one not wanted."""
        if "_t3" in name:  # ILSVRC2012's dogs of task 3 are in its train tar already
            return None
        for word in re.split(r"[/_.\-\d]+", name.lower()):
            for split in (word, SPLIT_WORDS.get(word)):
                if split in self.splits:
                    return split
            if word in SPLIT_WORDS:
                return None
        return ""

    def _placed(self, found: Listing) -> Listing:
        if found.kind == SAMPLES or found.unit["kind"] == FOLDER:
            if any("/ILSVRC2012_val_" in path for path in found.paths):
                found.paths = [self._sorted(path) for path in found.paths]
            return found
        split = "" if found.unit["lone"] else self.split_of(found.unit["name"])
        if found.kind == VAL:
            split = split or ("val" if "val" in self.splits else self.splits[-1])
            found.paths = [f"{split}/{self._ground_truth().wnid(path)}/{path}" for path in found.paths]
            return found
        prefix = f"{split}/" if split else ""
        if found.kind == CLASS:
            prefix += found.unit["name"].rpartition("/")[2].removesuffix(".tar") + "/"
        elif {path.partition("/")[0] for path in found.paths[:1]} & set(self.splits):
            prefix = ""
        if prefix:
            found.paths = [prefix + path for path in found.paths]
            found.folders = [prefix + path for path in found.folders] if found.kind == TREE else []
        return found

    def _sorted(self, path: str) -> str:
        """Loose validation images (`val/ILSVRC2012_val_…`, Kaggle's copy) are put into their class folders."""
        folder, _, name = path.rpartition("/")
        if folder.rpartition("/")[2] not in self.splits or not truth.VAL_IMAGE.fullmatch(name):
            return path
        placed = f"{folder}/{self._ground_truth().wnid(name)}/{name}"
        self.moved[placed] = path
        return placed

    def _ground_truth(self) -> truth.GroundTruth:
        if self._truth is None:
            single = any(unit["lone"] and unit["kind"] != FOLDER for unit in self.units)
            folder = self.uri.rpartition("/")[0] if single else self.uri
            self._truth = truth.load(truth.find(folder, self.val_labels))
            self.names = self._truth.names
        return self._truth


def open_source(uri: str, splits: tuple[str, ...], val_labels: str | None = None) -> Source:
    """Find out what lies at `uri`.

    Raises DataInvalid when nothing is there, ConfigError for archives that are compressed as a whole.
    """
    uri = storage.join(uri)
    local = local_path(uri)
    if local.is_file() if local else storage.exists(uri):
        source = Source(uri, "", [], [], splits, val_labels)
        _add_archives(source, [(uri.rpartition("/")[2], uri)], lone=True)
        source.layout = source.units[0]["kind"]
        return source
    if shards := _own_shards(uri):
        source = Source(uri, f"folder of {TAR}", [], [], splits, val_labels)
        own = [shard for shard in shards if source.split_of(shard[0]) is not None]
        source.ignored = len(shards) - len(own)
        _add_archives(source, own, lone=False)
        return source
    looked = _look(uri, local)
    if looked is None:
        raise DataInvalid(
            f"the source {uri} does not exist",
            expected="a folder of class folders, or a tar, zip or Parquet file of images",
            remedy="correct `source` (a local path or a URI)",
        )
    whole = Unit(kind=FOLDER, uri=uri, offset=0, size=0, container=-1, name="", lone=True)
    source = Source(uri, FOLDER, [], [whole], splits, val_labels)
    names, loose = looked
    wanted = [name for name in names if source.split_of(name) is not None]
    if not wanted:
        return source
    if any(name.startswith("attempts/") for name in wanted):
        raise DataInvalid(
            f"{uri} is the output of a shard step that has not finished",
            expected="the output folder of a finished one, whose record names its shards",
            remedy="finish it, or point `source` elsewhere",
        )
    source.units = []
    source.ignored = len(names) - len(wanted)
    _add_archives(source, [(name, storage.join(uri, name)) for name in wanted], lone=False)
    used = {source.split_of(name) or splits[0] for name in wanted}
    for split in splits:  # beside the official train tar, `val/` is often sorted into folders
        folder = storage.join(uri, split)
        path = local_path(folder)
        if split not in used and (path.is_dir() if path else bool(storage.list_files(folder, most=1))):
            source.units.append({**whole, "uri": folder, "name": split})
    taken = {unit["name"] for unit in source.units if unit["kind"] == FOLDER}
    left = [path for path in loose if source.split_of(path) is not None and path.split("/")[0] not in taken]
    if left:
        raise DataInvalid(
            f"{uri} holds archives and loose images: {wanted[0]!r}, and {left[0]!r} in a folder",
            expected="archives, or folders of images (beside archives only as a split that they lack)",
            remedy="move one of them out of the source, so that it is clear which is the data set",
        )
    official = any(name.rpartition("/")[2] == "ILSVRC2012_img_train.tar" for name in wanted)
    source.layout = "ilsvrc2012" if official else f"folder of {source.units[0]['kind']}"
    return source


def _own_shards(uri: str) -> list[tuple[str, str]]:
    """Names and URIs of the shards of a data set of ours, by its manifest; [] where there is none.

    Its folder may hold shards of attempts that died, which are no part of it.
    """
    for mark in ("record.json", "artifact.json", "manifest.json"):
        if not storage.exists(at := storage.join(uri, mark)):
            continue
        content = storage.read_json(at)
        artifact = content.get("artifact") or {}
        if artifact.get("kind") == "dataset" or str(content.get("format", "")).startswith("itpn-shards/"):
            where = manifest_of(uri)
            manifest = load_manifest(where)
            shards = [shard for split in manifest.splits.values() for shard in split.shards]
            return [(f"{shard.name}.tar", resolve(where, manifest, shard.path)) for shard in shards]
    return []


def _look(uri: str, local: Path | None) -> tuple[list[str], list[str]] | None:
    """Paths of the archives in a folder, and of one image of each folder of images; None without the folder."""
    archives, loose = [], dict[str, str]()
    paths: Iterable[str]
    if local is None:
        paths = [item.uri.removeprefix(uri + "/") for item in storage.list_files(uri)]
        if not paths:
            return None
    elif local.is_dir():
        paths = _walk(local)
    else:
        return None
    for path in paths:
        folder, _, name = path.rpartition("/")
        if _is_archive(name) and path.count("/") <= _DEPTH:
            archives.append(path)
        elif folder and folder not in loose and is_image(name):
            loose[folder] = path
    return sorted(archives), sorted(loose.values())


def _walk(local: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(local, followlinks=True, onerror=refuse_unreadable):
        relative = Path(folder).relative_to(local)
        folders[:] = sorted(folders) if len(relative.parts) < _DEPTH else []
        prefix = "" if folder == str(local) else f"{relative.as_posix()}/"
        yield from (prefix + name for name in files)


def _is_archive(name: str) -> bool:
    # Shards of ours bear their index beside them, which holds no images.
    return name.endswith(_ARCHIVES) and not name.endswith(".index.parquet")


def _add_archives(source: Source, archives: list[tuple[str, str]], *, lone: bool) -> None:
    begin = len(source.containers)
    source.containers += [uri for _, uri in archives]
    units = [
        Unit(kind="", uri=uri, offset=0, size=0, container=begin + number, name=name, lone=lone)
        for number, (name, uri) in enumerate(archives)
    ]
    with ThreadPoolExecutor(16) as pool:
        for expanded in pool.map(_expand, units):
            source.units += expanded


def _expand(unit: Unit) -> list[Unit]:
    """The container with kind and size, or, for a tar of tars, those inside it."""
    uri = unit["uri"]
    size = storage.size(uri)
    head = storage.read_range(uri, 0, min(512, size))
    for magic, tool in _COMPRESSED:
        if head.startswith(magic):
            raise ConfigError(
                f"the source {uri} is compressed; its members cannot be read by offset",
                expected="an uncompressed tar, a zip, or Parquet",
                remedy=f"{tool} it (images hardly shrink, so nothing is lost)",
            )
    kind = ZIP if head[:4] in (b"PK\x03\x04", b"PK\x05\x06") else PARQUET if head[:4] == b"PAR1" else TAR
    unit = {**unit, "kind": kind, "size": size}
    if kind != TAR:
        return [unit]
    with open_tar(uri, 0, size) as file:
        first = next((member.name for member in members(file, uri) if member.isreg()), "")
    if not first.endswith(".tar"):
        return [unit]
    inner = []
    folder = unit["name"].removesuffix(".tar") + "/"
    with open_tar(uri, 0, size) as file:
        for member in members(file, uri):
            if member.isreg() and not member.name.endswith(".tar"):
                raise DataInvalid(
                    f"{uri} is a tar of tars, but holds {member.name!r} too",
                    remedy="pack the class tars alone",
                )
            if member.isreg():
                where = {"offset": member.offset_data, "size": member.size, "lone": False}
                inner.append({**unit, **where, "name": folder + Listing(unit).safe(member.name)})
    return inner  # type: ignore[return-value]


def _tasks(units: list[Unit]) -> Iterator[list[Unit]]:
    """Units in groups that are worth a task."""
    group: list[Unit] = []
    for unit in units:
        group.append(unit)
        if len(group) == _TASK_UNITS or sum(item["size"] for item in group) >= _TASK_BYTES:
            yield group
            group = []
    if group:
        yield group
