"""From the classes of a data set to the rows of a classifier's head.

- By name, where the data set's class folders are classes of the classifier, all of them (ImageNet, -Sketch) or a
  part (-A, -R: 200 WordNet ids). Order does not matter.
- By number, where the class folders are the numbers of all the classifier's classes: ImageNet-V2's folders 0 … 999
  are indices in the order of the WordNet ids, so the classifier has 1000 classes. The folders' order by name
  (0, 1, 10, 100, …) means nothing.
- By order, where the classifier does not name its classes and has as many as the data set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError
from stages.data.class_names import repeated

_SHOWN = 5
_WNID = re.compile(r"n\d{8}")
# Where the sets come from whose labels are known here, by the names that recipes give them.
ORIGINS = {
    "imagenet-real": "real.json of https://github.com/google-research/reassessed-imagenet",
    "imagenet-v2": "a tar (gunzip it) or folder of https://github.com/modestyachts/ImageNetV2, class folders 0 … 999",
    "imagenet-a": "imagenet-a.tar of https://github.com/hendrycks/natural-adv-examples, or the folder it unpacks to",
    "imagenet-r": "imagenet-r.tar of https://github.com/hendrycks/imagenet-r, or the folder it unpacks to",
    "imagenet-sketch": "the zip of https://github.com/HaohanWang/ImageNet-Sketch, or the folder it unpacks to",
}
# A stage does not know whether a recipe or a person started it.
CLASSES_REMEDY = (
    "`--classes FILE` of itpn finetune and itpn evaluate, --set evaluate.classes=FILE with other recipes, or "
    "`--set classes=FILE` of python -m stages.evaluate"
)


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


def are_wnids(names: Sequence[str]) -> bool:
    """Whether all are WordNet ids, whose order by name is what published class indices count."""
    return all(_WNID.fullmatch(name) for name in names)


def match(dataset: str, classes: Sequence[str], names: Sequence[str] | None, rows: int) -> LabelSpace:
    """Find the head's row of every class of the data set.

    Args:
        dataset: the data set's name, for errors.
        classes: its class folders in label order.
        names: the classifier's classes in index order, if they are known.
        rows: of the head.

    Raises ConfigError when a class has no row, or the classes cannot be compared: names repeat, or numbers would
    count names that are no WordNet ids.
    """
    if names is not None and list(classes) == list(names):
        return LabelSpace(tuple(range(rows)), "name", rows)
    if names is not None and (twice := repeated(names) or repeated(classes)):
        raise ConfigError(
            f"classes of the classifier or of '{dataset}' cannot be told apart by name",
            expected="different names",
            found=f"repeated: {', '.join(twice[:_SHOWN])}",
            remedy="evaluate on data of the same classes in the same order, or on class folders with WordNet ids with "
            "a classifier that was fine-tuned on such",
        )
    row = {name: index for index, name in enumerate(names or ())}
    origin = f"; '{dataset}' is {ORIGINS[dataset]}" if dataset in ORIGINS else ""
    if set(classes) <= row.keys():
        return LabelSpace(tuple(row[name] for name in classes), "name", rows)
    if all(name.isdecimal() and str(int(name)) == name for name in classes):
        numbers = [int(name) for name in classes]
        if sorted(numbers) == list(range(rows)):
            if names is not None and not are_wnids(names):
                raise ConfigError(
                    f"the class folders of '{dataset}' are numbers, and the classifier's names do not tell which",
                    expected="WordNet ids such as n01440764, whose order the numbers count",
                    found=", ".join(list(names)[:_SHOWN]),
                    remedy="fine-tune on class folders with WordNet ids, or adopt the weights without class names and "
                    f"name them by WordNet id: {CLASSES_REMEDY}{origin}",
                )
            # Numbers count the WordNet ids in their order, whatever the order of the head.
            order = [row[name] for name in sorted(names)] if names is not None else range(rows)
            return LabelSpace(tuple(order[number] for number in numbers), "number", rows)
        raise ConfigError(
            f"the class folders of '{dataset}' are numbers, but not those of the classifier's classes",
            expected=f"folders 0 to {rows - 1}, one for each class; ImageNet-V2's 0 to 999 need a head of 1000",
            found=f"{len(numbers)} folders, {min(numbers)} to {max(numbers)}",
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
            remedy=f"{remedy}; the classifier does not name its classes: name them with {CLASSES_REMEDY}",
        )
    unknown = [name for name in classes if name not in row]
    raise ConfigError(
        f"the classifier and the data set have different classes: it does not know {len(unknown)} of "
        f"{len(classes)} classes of '{dataset}'",
        expected=f"class folders such as {', '.join(list(names)[:_SHOWN])}",
        found=", ".join(unknown[:_SHOWN]),
        remedy=remedy + origin,
    )
