"""From a listing to labelled samples: splits, classes, keys, in an order that does not depend on the layout.

Columns, not objects: a sample costs its path, its key and about 30 bytes of numbers, but no Python object.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DataInvalid
from stages.shard.scan import Entry

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_CHUNK = 1 << 16
_SHOWN = 5  # items named in an error


@dataclass(frozen=True)
class SplitIndex:
    """The samples of one split, sorted by path; all columns have one length."""

    paths: pa.ChunkedArray  # inside the source
    keys: pa.ChunkedArray  # class folder / file stem; unique, no dots
    offset: np.ndarray
    size: np.ndarray
    stored: np.ndarray
    deflated: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class SourceIndex:
    """All that was found: samples per split, class folders in label order, and a fingerprint of both."""

    splits: dict[str, SplitIndex]
    classes: list[str]
    ignored: int  # files that are no images by name, or lie outside class folders
    fingerprint: str


def build_index(entries: Iterable[Entry], split_names: tuple[str, ...], *, uri: str) -> SourceIndex:
    """Sort a listing into splits and classes.

    The tree is `<split>/<class>/…/image`, or `<class>/…/image`, in which case all of it is the first split;
    one folder around either is stripped. Labels count the class folders of the first split that is present,
    in the order of their names.

    Raises DataInvalid for a listing without images, a class folder without one, a class that the first
    split lacks, or a path that occurs twice.
    """
    listing = _Listing(entries)
    if not listing.rows:
        raise DataInvalid(
            f"{uri} holds no image",
            expected="class folders with .jpg, .jpeg or .png files",
            found=f"{listing.ignored} other files, {len(listing.folders)} folders",
            remedy="point `source` at the folder (or archive) above the class folders",
        )
    layout = _Layout(listing, split_names)
    split_ids, class_ids, keys, class_names = layout.assign(listing.paths)
    present = [name for index, name in enumerate(split_names) if (split_ids == index).any()]
    if not present:
        raise DataInvalid(
            f"{uri} holds images, but none in a class folder",
            expected="<split>/<class>/image or <class>/image",
            found=listing.paths[0].as_py(),
            remedy="sort the images into one folder per class",
        )
    _refuse_empty_classes(layout, listing.folders, split_ids, class_ids, class_names, uri)
    order = sorted(
        np.unique(class_ids[split_ids == split_names.index(present[0])]).tolist(), key=class_names.__getitem__
    )
    label_of = np.full(len(class_names), -1, np.int32)
    label_of[order] = np.arange(len(order), dtype=np.int32)
    splits = {}
    for name in present:
        rows = np.flatnonzero(split_ids == split_names.index(name))
        rows = rows[pc.sort_indices(listing.paths.take(pa.array(rows))).to_numpy()]
        labels = label_of[class_ids[rows]]
        if (labels < 0).any():
            raise DataInvalid(
                f"split '{name}' has a class folder that '{present[0]}' lacks: "
                f"'{class_names[class_ids[rows[np.argmin(labels)]]]}'",
                expected=f"one of the {len(order)} class folders of '{present[0]}'",
                remedy=f"remove the folder, or add images of the class to '{present[0]}'",
            )
        taken = pa.array(rows)
        splits[name] = SplitIndex(
            paths=_unique_paths(listing.paths.take(taken), uri),
            keys=_unique_keys(keys.take(taken)),
            offset=np.asarray(listing.offset)[rows],
            size=np.asarray(listing.size)[rows],
            stored=np.asarray(listing.stored)[rows],
            deflated=np.asarray(listing.deflated)[rows].astype(bool),
            label=labels,
        )
    ignored = listing.ignored + int((split_ids < 0).sum())
    classes = [class_names[index] for index in order]
    return SourceIndex(splits, classes, ignored, _fingerprint(splits, classes))


class _Listing:
    """The image entries of a source as columns, its folders, and the number of other files."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        chunks, names = [], []
        self.offset, self.size, self.stored, self.deflated = array("q"), array("q"), array("q"), array("b")
        self.folders: set[str] = set()
        self.ignored = 0
        for entry in entries:
            if entry.size < 0:
                self.folders.add(entry.path)
                continue
            folder, _, name = entry.path.rpartition("/")
            if name.startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES):
                self.ignored += 1
                self.folders.add(folder)
                continue
            names.append(entry.path)
            if len(names) == _CHUNK:
                chunks.append(pa.array(names, pa.large_string()))
                names = []
            self.offset.append(entry.offset)
            self.size.append(entry.size)
            self.stored.append(entry.stored)
            self.deflated.append(entry.deflated)
        self.paths = pa.chunked_array([*chunks, pa.array(names, pa.large_string())])
        self.rows = len(self.size)


class _Layout:
    """Where in a path the split and the class stand."""

    def __init__(self, listing: _Listing, split_names: tuple[str, ...]) -> None:
        self.split_names = split_names
        firsts: set[str] = set()
        seconds: set[str] = set()
        shallowest = 1 << 30
        for path in _values(listing.paths):
            parts = path.split("/", 3)
            firsts.add(parts[0])
            seconds.update(parts[1:2])
            shallowest = min(shallowest, len(parts))
        wrapped = len(firsts) == 1 and not firsts & set(split_names)
        self.skip = int(wrapped and (bool(seconds & set(split_names)) or shallowest >= 3))
        self.has_splits = bool((seconds if self.skip else firsts) & set(split_names))

    def parse(self, path: str) -> tuple[int, str | None, str]:
        """Split id (-1 when outside), class folder, and the path from the class folder on."""
        parts = path.split("/", self.skip + self.has_splits)
        rest = parts[-1] if len(parts) == self.skip + self.has_splits + 1 else ""
        split = 0
        if self.has_splits:
            name = parts[self.skip] if len(parts) > self.skip else ""
            split = self.split_names.index(name) if name in self.split_names else -1
        class_name, slash, _ = rest.partition("/")
        return split, class_name if slash else None, rest

    def assign(self, paths: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, pa.ChunkedArray, list[str]]:
        """For each path: split id (-1: not a sample), class id, key; and the class names by id."""
        splits, classes = array("b"), array("i")
        ids: dict[str, int] = {}
        chunks, keys = [], []
        for path in _values(paths):
            split, class_name, rest = self.parse(path)
            splits.append(split if class_name is not None else -1)
            classes.append(
                ids.setdefault(class_name, len(ids)) if class_name is not None and split >= 0 else -1
            )
            keys.append(rest.rpartition(".")[0].replace(".", "_"))
            if len(keys) == _CHUNK:
                chunks.append(pa.array(keys, pa.large_string()))
                keys = []
        columns = pa.chunked_array([*chunks, pa.array(keys, pa.large_string())])
        return np.asarray(splits), np.asarray(classes), columns, list(ids)


def _refuse_empty_classes(
    layout: _Layout,
    folders: set[str],
    split_ids: np.ndarray,
    class_ids: np.ndarray,
    class_names: list[str],
    uri: str,
) -> None:
    pairs = np.unique(np.stack([split_ids, class_ids])[:, split_ids >= 0], axis=1)
    filled = {(split, class_names[index]) for split, index in pairs.T.tolist()}
    empty = set()
    for folder in folders:
        split, class_name, _ = layout.parse(folder + "/")
        if split >= 0 and class_name and not class_name.startswith(".") and (split, class_name) not in filled:
            empty.add(f"{layout.split_names[split]}/{class_name}" if layout.has_splits else class_name)
    if empty:
        raise DataInvalid(
            f"{uri} has {len(empty)} class folder(s) with no image: " + ", ".join(sorted(empty)[:_SHOWN]),
            expected="at least one .jpg, .jpeg or .png in every class folder",
            remedy="remove the folder or add its images",
        )


def _unique_paths(paths: pa.ChunkedArray, uri: str) -> pa.ChunkedArray:
    """The sorted paths themselves; raises DataInvalid when two are equal."""
    if len(paths) > 1:
        same = pc.equal(paths.slice(1), paths.slice(0, len(paths) - 1))
        if pc.any(same).as_py():
            raise DataInvalid(
                f"{uri} holds the path {paths[pc.index(same, True).as_py()].as_py()!r} twice",
                remedy="pack the archive again from one folder; appended archives keep old versions of files",
            )
    return paths


def _unique_keys(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """Keys with `~2`, `~3`, … where one repeats (a.jpg beside a.png)."""
    if pc.count_distinct(keys).as_py() == len(keys):
        return keys
    seen: dict[str, int] = {}
    result = []
    for key in _values(keys):
        seen[key] = count = seen.get(key, 0) + 1
        result.append(key if count == 1 else f"{key}~{count}")
    return pa.chunked_array([pa.array(result, pa.large_string())])


def _fingerprint(splits: dict[str, SplitIndex], classes: list[str]) -> str:
    digest = hashlib.sha256("\n".join(classes).encode())
    for name, split in splits.items():
        digest.update(f"\n\n{name} {len(split)}\n".encode())
        for chunk in split.keys.chunks:
            digest.update("\n".join(chunk.to_pylist()).encode(errors="surrogateescape"))
        digest.update(np.ascontiguousarray(split.size, "<i8").tobytes())
        digest.update(np.ascontiguousarray(split.label, "<i4").tobytes())
    return digest.hexdigest()


def _values(strings: pa.ChunkedArray) -> Iterator[str]:
    for chunk in strings.chunks:
        yield from chunk.to_pylist()
