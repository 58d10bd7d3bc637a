"""Class names from a file: what a published classifier does not say of itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, NotFound

_FORMAT = (
    "one class (WordNet id) first on each line in index order, as in Kaggle's LOC_synset_mapping.txt, or the "
    "manifest.json of the data set that the classifier was trained on"
)


def repeated(names: Sequence[str]) -> list[str]:
    """Names that occur more than once, as ImageNet's English "crane" and "maillot" do."""
    return [name for name, count in Counter(names).items() if count > 1]


def read_pinned(uri: str, sha256: str | None, origin: str) -> bytes:
    """The bytes of a file; raises NotFound, or DataInvalid when they are others than pinned.

    Args:
        origin: what the file is, or where it comes from, for the remedy.
    """
    data = storage.read_bytes(uri)
    digest = storage.sha256_bytes(data)
    if sha256 is not None and digest != sha256:
        raise DataInvalid(
            f"{uri} is not the file that was pinned",
            expected=f"sha256 {sha256}",
            found=f"sha256 {digest}",
            remedy=f"bring back the file that was pinned ({origin}), or pin this one under a new version",
        )
    return data


def read_class_names(uri: str, rows: int, sha256: str | None = None) -> list[str]:
    """Class names in index order from a text file (the first word of each line) or a data set's manifest.

    Args:
        rows: of the head that they name.
        sha256: refuse any other file.

    Raises:
        ConfigError: there is no file, or it names another number of classes than the head has rows.
        DataInvalid: it is another file, or names no classes.
    """
    try:
        data = read_pinned(uri, sha256, _FORMAT)
    except NotFound:
        raise ConfigError(
            f"there is no file of class names at {uri}", expected=_FORMAT, remedy="correct `classes`"
        ) from None
    try:
        if data.lstrip().startswith(b"{"):
            names = [item["wnid"] for item in json.loads(data)["classes"]]
        else:
            names = [line.split()[0] for line in data.decode().splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise DataInvalid(
            f"{uri} does not name classes", expected=_FORMAT, found=error, remedy="correct `classes`"
        ) from None
    if len(names) != rows or len(set(names)) != rows:
        raise ConfigError(
            f"{uri} does not name the classifier's classes",
            expected=f"{rows} different names",
            found=f"{len(names)} names, {len(set(names))} of them different",
            remedy="give the classes that the classifier was trained on, in index order",
        )
    return names
