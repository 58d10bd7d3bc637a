"""List a tar of images, or a tar inside a tar, by its headers.

What archives may hold that has no place in a data set (links, devices, absolute paths, `..`) makes the
whole archive refused: such an archive was not made by packing a data set.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator

from cluster import storage
from cluster.errors import DataInvalid
from cluster.storage.range_file import RangeFile
from stages.shard import parquet
from stages.shard.listing import CLASS, SAMPLES, VAL, Listing, Unit, local_path
from stages.shard.truth import VAL_IMAGE, WNID

# Headers of a local tar are 100 KB apart, so a small buffer skips the images; a store answers a request no
# sooner than it sends 1 MB, so there the images between two headers are read and dropped.
_LOCAL_BUFFER = 1 << 12
_REMOTE_BUFFER = 4 << 20
_LABEL_BYTES = 32  # of a .cls member
_SAMPLE = re.compile(
    r"((?:.*/)?[^/.]+)\.([^/]*)"
)  # webdataset's rule: the key ends at the first dot of the name


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


def list_tar(unit: Unit) -> Listing:
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
