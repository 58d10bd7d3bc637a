"""From the classes of a data set to the rows of a classifier's head.

- By name, where the data set's class folders are classes of the classifier, all of them (ImageNet, -Sketch) or a
  part (-A, -R: 200 WordNet ids). Order does not matter.
- By number, where the class folders are numbers: ImageNet-V2's folders 0 … 999 are class indices. Their order by
  name (0, 1, 10, 100, …) means nothing.
- By order, where the classifier does not name its classes and has as many as the data set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, NotFound

_SHOWN = 5
# Where the sets come from whose labels are known here, by the names that recipes give them.
ORIGINS = {
    "imagenet-real": "real.json of https://github.com/google-research/reassessed-imagenet",
    "imagenet-v2": "a tar (gunzip it) or folder of https://github.com/modestyachts/ImageNetV2, class folders 0 … 999",
    "imagenet-a": "imagenet-a.tar of https://github.com/hendrycks/natural-adv-examples, or the folder it unpacks to",
    "imagenet-r": "imagenet-r.tar of https://github.com/hendrycks/imagenet-r, or the folder it unpacks to",
    "imagenet-sketch": "the zip of https://github.com/HaohanWang/ImageNet-Sketch, or the folder it unpacks to",
}


@dataclass(frozen=True)
class LabelSpace:
    """`index[i]` is the head's row of the data set's class i; `how` they were matched."""

    index: tuple[int, ...]
    how: Literal["name", "number", "order"]
    rows: int  # of the head

    @property
    def is_subset(self) -> bool:
        """Whether the data set lacks classes of the classifier."""
        return len(self.index) < self.rows


def match(dataset: str, classes: Sequence[str], names: Sequence[str] | None, rows: int) -> LabelSpace:
    """Find the head's row of every class of the data set.

    Args:
        dataset: the data set's name, for errors.
        classes: its class folders in label order.
        names: the classifier's classes in index order, if they are known.
        rows: of the head.

    Raises ConfigError when a class has no row, or the classes cannot be compared.
    """
    row = {name: index for index, name in enumerate(names or ())}
    origin = f"; '{dataset}' is {ORIGINS[dataset]}" if dataset in ORIGINS else ""
    if set(classes) <= row.keys():
        return LabelSpace(tuple(row[name] for name in classes), "name", rows)
    if all(name.isdecimal() and str(int(name)) == name for name in classes):
        numbers = tuple(int(name) for name in classes)
        if max(numbers) < rows:
            return LabelSpace(numbers, "number", rows)
        raise ConfigError(
            f"the class folders of '{dataset}' are numbers beyond the classifier's classes",
            expected=f"class indices 0 to {rows - 1}, as in ImageNet-V2",
            found=f"{max(numbers)}",
            remedy="evaluate a classifier of the classes that the numbers count" + origin,
        )
    if names is None and len(classes) == rows:
        return LabelSpace(tuple(range(rows)), "order", rows)
    remedy = (
        "evaluate on the data set that it was fine-tuned on, or on one with class folders of the same names"
    )
    if names is None:
        raise ConfigError(
            "the classifier and the data set have different classes",
            expected=f"{len(classes)} classes, as '{dataset}' has, or names to match them by",
            found=rows,
            remedy=f"{remedy}; the classifier does not name its classes: name them with --set classes=FILE",
        )
    unknown = [name for name in classes if name not in row]
    raise ConfigError(
        f"the classifier and the data set have different classes: it does not know {len(unknown)} of "
        f"{len(classes)} classes of '{dataset}'",
        expected=f"class folders such as {', '.join(list(names)[:_SHOWN])}",
        found=", ".join(unknown[:_SHOWN]),
        remedy=remedy + origin,
    )


def read_classes(uri: str, rows: int) -> list[str]:
    """Class names in index order from a text file (the first word of each line) or a data set's manifest.

    Raises ConfigError when there is no file or it names another number of classes than the head has rows.
    """
    try:
        data = storage.read_bytes(uri)
    except NotFound:
        raise ConfigError(
            f"there is no file of class names at {uri}",
            expected="one class (WordNet id) on each line in index order, as Kaggle's LOC_synset_mapping.txt, "
            "or the manifest.json of the data set that the classifier was trained on",
            remedy="correct `classes`",
        ) from None
    try:
        if data.lstrip().startswith(b"{"):
            names = [item["wnid"] for item in json.loads(data)["classes"]]
        else:
            names = [line.split()[0] for line in data.decode().splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise DataInvalid(f"{uri} does not name classes", found=error, remedy="correct `classes`") from None
    if len(names) != rows or len(set(names)) != rows:
        raise ConfigError(
            f"{uri} does not name the classifier's classes",
            expected=f"{rows} different names",
            found=f"{len(names)} names, {len(set(names))} of them different",
            remedy="give the classes that the classifier was trained on, in index order",
        )
    return names
