"""List a source: every regular file in it, by container, offset and size. Nothing is unpacked.

A source is a folder tree, an uncompressed tar, or a zip, local or at any URI. What archives may hold that
has no place in a data set (links, devices, absolute paths, `..`) makes the whole archive refused: such an
archive was not made by packing a data set.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from cluster.errors import ConfigError, DataInvalid

FILE, TAR, ZIP = "folder", "tar", "zip"


class Entry(NamedTuple):
    """One regular file of a source, or (with size -1) one folder."""

    path: str  # inside the source, with forward slashes
    offset: int  # of the data (tar) or of the local header (zip); 0 for a file of its own
    size: int
    stored: int  # bytes as stored: differs from `size` only in a zip
    deflated: bool


def layout_of(uri: str) -> str:
    """`folder`, `tar` or `zip`; DataInvalid when nothing is there, ConfigError for a compressed tar."""
    local = local_path(uri)
    if local.is_dir() if local else not storage.exists(uri) and bool(storage.list_files(uri)):
        return FILE
    if not (local.is_file() if local else storage.exists(uri)):
        raise DataInvalid(
            f"the source {uri} does not exist",
            expected="a folder of class folders, or a tar or zip of one",
            remedy="correct `source` (a local path or a URI)",
        )
    head = storage.read_range(uri, 0, min(512, storage.size(uri)))
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZIP
    for magic, tool in (
        (b"\x1f\x8b", "gunzip"),
        (b"BZh", "bunzip2"),
        (b"\xfd7zXZ", "unxz"),
        (b"(\xb5/\xfd", "unzstd"),
    ):
        if head.startswith(magic):
            raise ConfigError(
                f"the source {uri} is compressed; its members cannot be read by offset",
                expected="an uncompressed tar, or a zip",
                remedy=f"{tool} it (images hardly shrink, so nothing is lost)",
            )
    return TAR


def scan(uri: str, layout: str) -> Iterator[Entry]:
    """Every file and folder of the source, in its own order; raises DataInvalid for what it refuses."""
    entries = {FILE: _scan_folder, TAR: _scan_tar, ZIP: _scan_zip}[layout](uri)
    for entry in entries:
        parts = entry.path.split("/")
        if entry.path.startswith("/") or ".." in parts or "\\" in entry.path or "\0" in entry.path:
            raise DataInvalid(
                f"{uri} holds a member with an unsafe path: {entry.path!r}",
                expected="relative paths without '..'",
                remedy="pack the data set again from inside its folder",
            )
        yield entry._replace(path="/".join(part for part in parts if part not in ("", ".")))


def local_path(uri: str) -> Path | None:
    """The path when the URI is on this machine's file system, else None."""
    normal = storage.join(uri)
    return None if "://" in normal else Path(normal)


def _scan_folder(uri: str) -> Iterator[Entry]:
    local = local_path(uri)
    if local is None:
        prefix = storage.join(uri) + "/"
        for found in storage.list_files(uri):
            yield Entry(found.uri.removeprefix(prefix), 0, found.bytes, found.bytes, False)
        return
    for folder, folders, files in os.walk(local, followlinks=True):
        folders.sort()
        relative = Path(folder).relative_to(local).as_posix()
        if relative.count("/") > 32:
            raise DataInvalid(
                f"{local} is nested more than 32 folders deep", found=relative, remedy="remove link loops"
            )
        if relative != ".":
            yield Entry(relative, 0, -1, -1, False)
        for name in sorted(files):
            size = (Path(folder) / name).stat().st_size
            yield Entry(name if relative == "." else f"{relative}/{name}", 0, size, size, False)


def _scan_tar(uri: str) -> Iterator[Entry]:
    with storage.open_read(uri) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                    if member.isdir():
                        yield Entry(member.name, 0, -1, -1, False)
                    elif member.isreg() and not member.issparse():
                        yield Entry(member.name, member.offset_data, member.size, member.size, False)
                    else:
                        raise DataInvalid(
                            f"{uri} holds a member that is neither a file nor a folder: {member.name!r}",
                            found=f"tar type {member.type!r} (link, device, pipe or sparse file)",
                            remedy="pack the data set again with links followed (tar --dereference)",
                        )
                end = tar.offset
            # tarfile ends quietly at a damaged header; only a block of zeros is a real end.
            file.seek(end)
            ended = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
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


def _scan_zip(uri: str) -> Iterator[Entry]:
    try:
        with storage.open_read(uri) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                kind = (info.external_attr >> 16) & 0o170000
                if info.is_dir():
                    yield Entry(info.filename, 0, -1, -1, False)
                    continue
                if kind not in (0, 0o100000) or info.flag_bits & 1 or info.compress_type not in (0, 8):
                    raise DataInvalid(
                        f"{uri} holds a member that is not a plain file: {info.filename!r}",
                        expected="stored or deflated files, not encrypted, no links",
                        found=f"mode {kind:o}, compression {info.compress_type}, flags {info.flag_bits:#x}",
                        remedy="pack the data set again with plain zip",
                    )
                yield Entry(
                    info.filename,
                    info.header_offset,
                    info.file_size,
                    info.compress_size,
                    info.compress_type == 8,
                )
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataInvalid(
            f"{uri} is not a readable zip: {error}", remedy="check that the file was copied whole"
        ) from None
