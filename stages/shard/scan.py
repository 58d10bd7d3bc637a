"""List one container of a source: which images it holds, where, and what it seems to be. Nothing is unpacked.

What archives may hold that has no place in a data set (links, devices, absolute paths, `..`) makes the
whole archive refused: such an archive was not made by packing a data set.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import zipfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypedDict

from cluster import storage
from cluster.errors import DataInvalid
from cluster.storage.range_file import RangeFile
from stages.shard import parquet
from stages.shard.truth import VAL_IMAGE, WNID

FOLDER, TAR, ZIP, PARQUET = "folder", "tar", "zip", "parquet"
TREE, CLASS, VAL, SAMPLES = "tree", "class", "val", "samples"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# What folders and archives call the splits.
SPLIT_WORDS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "dev",
    "test": "test",
}
_CHUNK = 1 << 16
# Headers of a local tar are 100 KB apart, so a small buffer skips the images; a store answers a request no
# sooner than it sends 1 MB, so there the images between two headers are read and dropped.
_LOCAL_BUFFER = 1 << 12
_REMOTE_BUFFER = 4 << 20
_LABEL_BYTES = 32  # of a .cls member
_SAMPLE = re.compile(
    r"((?:.*/)?[^/.]+)\.([^/]*)"
)  # webdataset's rule: the key ends at the first dot of the name


class Unit(TypedDict):
    """One container to list, by one task: a file, a tar inside a tar, or a folder."""

    kind: str
    uri: str
    offset: int  # of a tar inside a tar, else 0
    size: int
    container: int  # number of the file that the offsets are counted in; -1: every image is a file
    name: str  # path inside the source; names the split and the class where the members do not
    lone: bool  # the container is all of the source


@dataclass
class Listing:
    """Images of one container, as columns of one length, and what the container is.

    `kind` is `tree` (paths hold the class folders), `class` (all of one class), `val` (ILSVRC2012's flat
    validation images), or `samples` (labels are numbers, paths are keys).
    """

    unit: Unit
    kind: str = TREE
    paths: list[str] = field(default_factory=list)
    offset: array = field(default_factory=lambda: array("q"))  # of the data; zip: local header; Parquet: row
    size: array = field(default_factory=lambda: array("q"))  # bytes; Parquet: the mean of the row group
    aux: array = field(
        default_factory=lambda: array("q")
    )  # zip: stored bytes * 2 + deflated; Parquet: row group
    labels: array = field(default_factory=lambda: array("i"))  # of kind `samples` only
    folders: list[str] = field(default_factory=list)
    ignored: int = 0
    class_names: list[str] | None = None

    def add(self, path: str, offset: int, size: int, aux: int = 0) -> None:
        """Note one file, or count it as ignored when its name is not an image's."""
        path = self.safe(path)
        folder, _, name = path.rpartition("/")
        if not is_image(name):
            self.ignored += 1
            self.add_folder(folder)
            return
        if not path.isascii():
            self._refuse_bytes(path)
        self.paths.append(path)
        self.offset.append(offset)
        self.size.append(size)
        self.aux.append(aux)

    def add_folder(self, path: str) -> None:
        """Note a folder that may hold no image; the one of macOS's resource forks is none of the data set's."""
        if "__MACOSX" not in path.split("/"):
            self.folders.append(path)

    def _refuse_bytes(self, path: str) -> None:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataInvalid(
                f"{self.unit['uri']} holds a name that is not UTF-8: {path!r}",
                expected="names in UTF-8: they become the samples' keys",
                remedy="rename the file (convmv converts whole trees), and pack archives again",
            ) from None

    def safe(self, path: str) -> str:
        """The path in its plain form; raises DataInvalid when it could leave the folder it belongs to."""
        if path.startswith("/") or "\\" in path or "\0" in path or (".." in path and ".." in path.split("/")):
            raise DataInvalid(
                f"{self.unit['uri']} holds a member with an unsafe path: {path!r}",
                expected="relative paths without '..'",
                remedy="pack the data set again from inside its folder",
            )
        if "./" in path or "//" in path or path.endswith(("/", ".")):
            path = "/".join(part for part in path.split("/") if part not in ("", "."))
        return path


def is_image(name: str) -> bool:
    """Whether a file of this name (without folders) counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def local_path(uri: str) -> Path | None:
    """The path when the URI is on this machine's file system, else None."""
    normal = storage.join(uri)
    return None if "://" in normal else Path(normal)


def list_units(units: list[Unit]) -> list[Listing]:
    """`list_unit` of several, for a worker."""
    return [listing for unit in units for listing in list_unit(unit)]


def list_unit(unit: Unit) -> Iterator[Listing]:
    """What the container holds; raises DataInvalid for what it refuses."""
    if unit["kind"] == FOLDER:
        yield from _list_folder(unit)
    elif unit["kind"] == TAR:
        yield _list_tar(unit)
    elif unit["kind"] == ZIP:
        yield _list_zip(unit)
    else:
        found = Listing(unit, kind=SAMPLES)
        found.paths, found.offset, found.size, found.aux, found.labels, found.class_names = parquet.list_rows(
            unit["uri"], unit["name"]
        )
        yield found


def open_tar(uri: str, offset: int, size: int) -> io.BufferedReader:
    """A tar, or the tar inside a tar, as a file of its own."""
    raw = RangeFile(lambda where, start, length: storage.read_range(where, offset + start, length), uri, size)
    return io.BufferedReader(raw, _LOCAL_BUFFER if local_path(uri) else _REMOTE_BUFFER)


def members(file: io.BufferedReader, uri: str) -> Iterator[tarfile.TarInfo]:
    """The files and folders of a tar in their order; raises DataInvalid for any other kind, or damage."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                if not (member.isdir() or (member.isreg() and not member.issparse())):
                    raise DataInvalid(
                        f"{uri} holds a member that is neither a file nor a folder: {member.name!r}",
                        found=f"tar type {member.type!r} (link, device, pipe or sparse file)",
                        remedy="pack the data set again with links followed (tar --dereference)",
                    )
                yield member
            end = tar.offset
        # tarfile ends quietly at a damaged header; only a block of zeros is a real end.
        file.seek(end)
        rest = file.read(2 * tarfile.RECORDSIZE)  # padding to a whole record, if anything
        ended = rest[: tarfile.BLOCKSIZE] == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise DataInvalid(
            f"{uri} is not a readable tar: {error}", remedy="check that the file was copied whole"
        ) from None
    if not ended:
        raise DataInvalid(
            f"{uri} is damaged or cut short at byte {end}",
            expected="a member header or the end-of-archive block",
            remedy="copy the archive again and compare its checksum",
        )
    if any(rest):
        raise DataInvalid(
            f"{uri} goes on after its end at byte {end}: it was joined from several tars",
            remedy="put the tars beside each other in a folder, or pack them again as one",
        )


def _list_folder(unit: Unit) -> Iterator[Listing]:
    local = local_path(unit["uri"])
    prefix = unit["name"] + "/" if unit["name"] else ""
    found = Listing(unit)
    if local is None:
        root = storage.join(unit["uri"]) + "/"
        for item in storage.list_files(unit["uri"]):
            found.add(prefix + item.uri.removeprefix(root), 0, item.bytes)
        yield found
        return
    for folder, folders, files in os.walk(local, followlinks=True, onerror=refuse_unreadable):
        folders.sort()
        relative = Path(folder).relative_to(local).as_posix()
        if relative.count("/") > 32:
            raise DataInvalid(
                f"{local} is nested more than 32 folders deep", found=relative, remedy="remove link loops"
            )
        here = prefix if relative == "." else f"{prefix}{relative}/"
        if relative != ".":
            found.folders.append(here[:-1])
        for name in sorted(files):
            found.add(here + name, 0, _file_size(f"{folder}/{name}") if is_image(name) else 0)
        if len(found.paths) >= _CHUNK:
            yield found
            found = Listing(unit)
    yield found


def refuse_unreadable(error: OSError) -> NoReturn:
    """For os.walk, which leaves out in silence what it may not list."""
    raise DataInvalid(
        f"the folder {error.filename} cannot be listed",
        found=error.strerror,
        remedy="let this user read it, or move it out of the source",
    )


def _file_size(path: str) -> int:
    try:
        status = os.stat(path)  # noqa: PTH116 (a hot loop)
    except OSError as error:
        raise DataInvalid(
            f"the image {path!r} cannot be looked at",
            found=error.strerror,
            remedy="remove the link if it points nowhere; let this user read the folder",
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataInvalid(
            f"{path!r} is named like an image, but is no file",
            expected="a regular file, or a link to one",
            found=f"mode {status.st_mode:o} (a pipe, socket or device)",
            remedy="remove it from the source",
        )
    return status.st_size


def _list_tar(unit: Unit) -> Listing:
    where = unit["uri"] if not unit["offset"] else f"{unit['name']} inside {unit['uri']}"
    found = Listing(unit)
    labels: dict[str, int] = {}
    described: set[str] = set()  # stems of files that other tools write beside each image
    with open_tar(unit["uri"], unit["offset"], unit["size"]) as file:
        for member in members(file, where):
            if member.isdir():
                found.add_folder(found.safe(member.name))
            elif member.name.endswith(".cls") and member.size <= _LABEL_BYTES:
                file.seek(member.offset_data)
                labels[found.safe(member.name)[:-4]] = _label(file.read(member.size), member.name, where)
            elif member.name.endswith(".tar"):
                raise DataInvalid(
                    f"{where} holds images beside tars, or tars inside tars of tars: {member.name!r}",
                    expected="images, or one tar for each class",
                    remedy="unpack the outermost tar",
                )
            else:
                if member.name.endswith((".json", ".txt")):
                    described.add(member.name.rpartition(".")[0])
                found.add(member.name, unit["offset"] + member.offset_data, member.size)
    if labels:
        _as_samples(found, labels, where)
    elif described and (bare := next((p for p in found.paths if p.rpartition(".")[0] in described), None)):
        raise DataInvalid(
            f"{where} holds samples without a class: {bare!r} has a .json or .txt beside it, but no .cls",
            expected="a .cls member with the class number for each image, or images alone",
            remedy="write the class numbers into the tars; captions (img2dataset) are no labels",
        )
    elif _is_val(found.paths):
        found.kind, found.folders = VAL, []
        found.paths = [path.rpartition("/")[2] for path in found.paths]
    elif found.paths and not unit["lone"] and not any("/" in path for path in found.paths):
        found.kind = CLASS
    return found


def _is_val(paths: list[str]) -> bool:
    """Whether these are ILSVRC2012's validation images in one heap, bare or in a folder around them."""
    folders = {path.rpartition("/")[0] for path in paths}
    if len(folders) != 1 or WNID.fullmatch(folders.pop().rpartition("/")[2]):
        return False
    return all(VAL_IMAGE.fullmatch(path.rpartition("/")[2]) for path in paths)


def _as_samples(found: Listing, labels: dict[str, int], where: str) -> None:
    found.kind = SAMPLES
    keys = set()
    for path in found.paths:
        match = _SAMPLE.fullmatch(path)
        key = match.group(1) if match else ""
        if key not in labels or key in keys:
            raise DataInvalid(
                f"{where} is no WebDataset tar of labelled images: {path!r} has "
                + ("a second image beside it" if key in keys else "no label"),
                expected="one .jpg or .png and one .cls for each key",
                remedy="write the tars again with one image and its class number (.cls) for each sample",
            )
        keys.add(key)
        found.labels.append(labels[key])
    found.ignored += len(labels) - len(keys)


def _label(text: bytes, name: str, where: str) -> int:
    if not text.strip().isdigit() or int(text) > parquet.MAX_LABEL:
        raise DataInvalid(
            f"{where}: the label {name!r} is no class number",
            expected=f"digits, such as 207, of at most {parquet.MAX_LABEL}",
            found=text,
            remedy="number the classes from 0 on",
        )
    return int(text)


def _list_zip(unit: Unit) -> Listing:
    found = Listing(unit)
    try:
        with storage.open_read(unit["uri"]) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                kind = (info.external_attr >> 16) & 0o170000
                if info.is_dir():
                    found.add_folder(found.safe(info.filename))
                    continue
                if kind not in (0, 0o100000) or info.flag_bits & 1 or info.compress_type not in (0, 8):
                    raise DataInvalid(
                        f"{unit['uri']} holds a member that is not a plain file: {info.filename!r}",
                        expected="stored or deflated files, not encrypted, no links",
                        found=f"mode {kind:o}, compression {info.compress_type}, flags {info.flag_bits:#x}",
                        remedy="pack the data set again with plain zip",
                    )
                stored = info.compress_size * 2 + (info.compress_type == 8)
                found.add(info.filename, info.header_offset, info.file_size, stored)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataInvalid(
            f"{unit['uri']} is not a readable zip: {error}", remedy="check that the file was copied whole"
        ) from None
    return found
