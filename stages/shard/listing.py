"""What a scan finds: the containers of a source, and the images in each as columns."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from cluster import storage
from cluster.errors import DataInvalid

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
