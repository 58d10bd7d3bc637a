"""From listings to labelled samples: splits, classes, keys, in an order that does not depend on the layout.

Columns, not objects: a sample costs the bytes of its file name and about 50 bytes of numbers, folders are
stored once, and keys are made when a shard is cut. bench/shard_index.py measures it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from cluster.errors import DataInvalid
from stages.shard.layout import Layout, refuse_empty_classes
from stages.shard.listing import SAMPLES, Listing
from stages.shard.table import Table

_META = re.compile(r"__[^/]*__/")


@dataclass(frozen=True)
class SplitIndex:
    """The samples of one split: rows of the table in canonical order (by a hash of the key)."""

    rows: np.ndarray  # int64
    renamed: dict[int, str]  # row -> key, where the key alone would repeat

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class SourceIndex:
    """All that was found: samples per split, class names in label order, and a fingerprint of both."""

    table: Table
    labels: np.ndarray  # int32, of all rows of the table; -1 outside the splits
    splits: dict[str, SplitIndex]
    classes: list[str]
    ignored: int  # files that are no images by name, or lie outside class folders
    fingerprint: str
    strip: int  # leading folders of a path that are no part of the key

    def paths(self, rows: np.ndarray) -> list[str]:
        """Paths inside the source."""
        folders = [self.table.folders[i] for i in np.asarray(self.table.folder)[rows].tolist()]
        names = zip(folders, self.table.names(rows), strict=True)
        return [f"{folder}/{name}" if folder else name for folder, name in names]

    def keys(self, split: str, rows: np.ndarray, paths: list[str]) -> list[str]:
        """Keys of rows, whose `paths` are given; unique within the split."""
        renamed = self.splits[split].renamed
        keys = [_key(_stripped(path.rpartition("/")[0], self.strip), path) for path in paths]
        return [renamed.get(row, key) for row, key in zip(rows.tolist(), keys, strict=True)]


def build_index(
    listings: Iterable[Listing],
    split_names: tuple[str, ...],
    *,
    uri: str,
    split_of: Callable[[str], str | None] = lambda name: "",
) -> SourceIndex:
    """Sort listings into splits and classes.

    Trees are `<split>/<class>/…/image`, or `<class>/…/image`, in which case all of it is the first split;
    one folder around either is stripped. Labels count the class folders of the first split that is present,
    in the order of their names. Sources that state labels keep them; `split_of` then tells the split of a
    container from its name.

    Raises DataInvalid for a listing without images, a class folder without one, a class that the first
    split lacks, a path that occurs twice, or a mixture of labelled samples and class folders.
    """
    table, folders, ignored, class_names, kinds = Table(), set[str](), 0, None, set()
    for found in listings:
        ignored += found.ignored
        if found.kind == SAMPLES:
            split = split_of(found.unit["name"]) or split_names[0]
            table.add(found, folder_prefix=split + "/")
            class_names = class_names or found.class_names
        else:
            table.add(found)
            folders.update(found.folders)
        if found.paths:
            kinds.add(found.kind == SAMPLES)
    if not len(table):
        raise DataInvalid(
            f"{uri} holds no image",
            expected="class folders with .jpg, .jpeg or .png files",
            found=f"{ignored} other files, {len(folders)} folders",
            remedy="point `source` at the folder (or archive) above the class folders",
        )
    if len(kinds) == 2:
        raise DataInvalid(
            f"{uri} mixes samples with labels of their own and class folders",
            expected="one kind of source",
            remedy="point `source` at one of them, and shard the other as a data set of its own",
        )
    if table.label is not None:
        layout = Layout(table.folders, split_names, prefixed=True)
        split_of_row = layout.split_ids[np.asarray(table.folder)]
        labels, classes = _stated(table, class_names)
    else:
        layout = Layout(table.folders, split_names)
        split_of_row = layout.split_ids[np.asarray(table.folder)]
        refuse_empty_classes(layout, folders, uri)
        labels, classes = _from_folders(table, layout, split_names, split_of_row, uri)
    splits, digest = {}, hashlib.sha256("\n".join(classes).encode())
    hashes = _hashes(table, layout.strip)
    for number, name in enumerate(split_names):
        rows = np.flatnonzero(split_of_row == number)
        if not len(rows):
            continue
        rows = rows[np.argsort(hashes[rows], kind="stable")]
        renamed = _resolve_equal_keys(table, layout.strip, rows, hashes[rows], uri)
        splits[name] = SplitIndex(rows, renamed)
        digest.update(f"\n\n{name} {len(rows)}\n".encode())
        digest.update(hashes[rows].astype("<u8").tobytes())
        digest.update(np.asarray(table.size)[rows].astype("<i8").tobytes())
        digest.update(labels[rows].astype("<i4").tobytes())
    return SourceIndex(
        table,
        labels,
        splits,
        classes,
        ignored + int((split_of_row < 0).sum()),
        digest.hexdigest(),
        layout.strip,
    )


def _from_folders(
    table: Table, layout: Layout, split_names: tuple[str, ...], split_of_row: np.ndarray, uri: str
) -> tuple[np.ndarray, list[str]]:
    """Labels and class names by the class folders of the first split that is present."""
    used = {
        (int(split), name) for split, name in zip(layout.split_ids, layout.classes, strict=True) if split >= 0
    }
    if not used:
        raise DataInvalid(
            f"{uri} holds images, but none in a class folder",
            expected="<split>/<class>/image or <class>/image",
            found="/".join(filter(None, (table.folders[table.folder[0]], table.names(np.array([0]))[0]))),
            remedy="sort the images into one folder per class"
            + (
                "; if a class bears the name of a split, set `splits` to other names"
                if layout.has_splits
                else ""
            ),
        )
    first = min(split for split, _ in used)
    classes = sorted(str(name) for split, name in used if split == first)
    number = {name: i for i, name in enumerate(classes)}
    for split, name in sorted(used, key=str):
        if name not in number:
            raise DataInvalid(
                f"split '{split_names[split]}' has a class folder that '{split_names[first]}' lacks: '{name}'",
                expected=f"one of the {len(classes)} class folders of '{split_names[first]}'",
                remedy=f"remove the folder, or add images of the class to '{split_names[first]}'",
            )
    known = zip(layout.split_ids, layout.classes, strict=True)
    of_folder = np.array([number[str(name)] if split >= 0 else -1 for split, name in known], np.int32)
    return of_folder[np.asarray(table.folder)], classes


def _stated(table: Table, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """The source's own labels, and class names: as stated, or the folders of the keys when they are 1:1."""
    labels = np.asarray(table.label, np.int32)
    count = max(int(labels.max()) + 1, len(names or ()))
    if names is None:
        # A key `class/file` of a split names the class: true if every folder has one label and vice versa.
        pairs = np.unique(np.stack([np.asarray(table.folder), labels]), axis=1)
        folders = {(table.folders[f].partition("/")[2], label) for f, label in pairs.T.tolist()}
        names = [""] * count
        for folder, label in folders:
            names[label] = folder
        if len(folders) != count or len(set(names)) != count or "" in names:
            names = [f"{label:0{len(str(count - 1))}d}" for label in range(count)]
    if len(names) < count:
        raise DataInvalid(
            f"the source has label {count - 1}, but names only {len(names)} classes",
            remedy="correct the labels or the class names in the files' metadata",
        )
    return labels, names


def _stripped(folder: str, strip: int) -> str:
    parts = folder.split("/", strip)
    return parts[strip] if len(parts) > strip else ""


def _key(folder: str, name: str) -> str:
    """The sample's key. Dots would end it for readers of WebDataset tars."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    key = f"{folder}/{stem}".replace(".", "_") if folder else stem.replace(".", "_")
    if key.startswith("__") and _META.match(key):
        return key[1:]  # webdataset would take it for its own and skip it
    return key


def _hashes(table: Table, strip: int) -> np.ndarray:
    """uint64 hash of every row's key: the canonical order, at 8 bytes where the keys would need 40."""
    prefixes = [_stripped(folder, strip) for folder in table.folders]
    result = np.empty(len(table), np.uint64)
    for begin, names in table.chunks():
        folders = table.folder[begin : begin + len(names)]
        digests = [_digest(_key(prefixes[f], name)) for f, name in zip(folders, names, strict=True)]
        result[begin : begin + len(names)] = np.frombuffer(b"".join(digests), "<u8")
    return result


def _digest(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=8).digest()


def _holds(hashes: np.ndarray, key: str) -> bool:
    """Whether a key's hash is among those of a split, which are sorted."""
    wanted = np.frombuffer(_digest(key), "<u8")[0]
    at = int(np.searchsorted(hashes, wanted))
    return at < len(hashes) and bool(hashes[at] == wanted)


def _resolve_equal_keys(
    table: Table, strip: int, rows: np.ndarray, hashes: np.ndarray, uri: str
) -> dict[int, str]:
    """Put rows of equal hash into an order of their own, and give repeated keys `~2`, `~3`, … (a.jpg, a.png),
    passing over numbers that make a key of another file.

    Rows of one path are an error, except where the source states keys: those may start anew in every file.
    """
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    renamed: dict[int, str] = {}
    if not len(same):
        return renamed
    for run in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1):
        begin, end = int(run[0]), int(run[-1]) + 2
        items = []
        for row, name in zip(rows[begin:end].tolist(), table.names(rows[begin:end]), strict=True):
            folder = table.folders[table.folder[row]]
            key = _key(_stripped(folder, strip), name)
            items.append((key, folder, name, table.container[row], table.offset[row], row))
        items.sort()
        rows[begin:end] = [item[-1] for item in items]
        number = 1
        for before, item in pairwise(items):
            if before[:3] == item[:3] and table.label is None:
                raise DataInvalid(
                    f"{uri} holds the path {f'{item[1]}/{item[2]}'!r} twice",
                    remedy="pack the archive again from one folder; appended archives keep old versions of files",
                )
            number = number + 1 if before[0] == item[0] else 1
            if number > 1:
                while _holds(hashes, f"{item[0]}~{number}"):
                    number += 1
                renamed[item[-1]] = f"{item[0]}~{number}"
    return renamed
