"""List one container of a source: which images it holds, where, and what it seems to be. Nothing is unpacked."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from cluster import storage
from cluster.errors import DataInvalid
from stages.shard import parquet
from stages.shard.listing import FOLDER, SAMPLES, TAR, ZIP, Listing, Unit, is_image, local_path
from stages.shard.tars import list_tar

_CHUNK = 1 << 16


def list_units(units: list[Unit]) -> list[Listing]:
    """`list_unit` of several, for a worker."""
    return [listing for unit in units for listing in list_unit(unit)]


def list_unit(unit: Unit) -> Iterator[Listing]:
    """What the container holds; raises DataInvalid for what it refuses."""
    if unit["kind"] == FOLDER:
        yield from _list_folder(unit)
    elif unit["kind"] == TAR:
        yield list_tar(unit)
    elif unit["kind"] == ZIP:
        yield _list_zip(unit)
    else:
        found = Listing(unit, kind=SAMPLES)
        found.paths, found.offset, found.size, found.aux, found.labels, found.class_names = parquet.list_rows(
            unit["uri"], unit["name"]
        )
        yield found


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
