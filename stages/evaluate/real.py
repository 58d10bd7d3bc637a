"""ImageNet-ReaL: validation images with the labels of "Are we done with ImageNet?" (arXiv:2006.07159).

`real.json` of github.com/google-research/reassessed-imagenet is a list with, for each validation image in the order
of its number, the list of labels that hold for it, as class indices in the order of the WordNet ids. A prediction
counts when it is one of them; images without a label are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cluster import distributed, storage
from cluster.errors import ConfigError, DataInvalid, NotFound
from stages.data.class_names import read_pinned
from stages.evaluate.found import Values
from stages.evaluate.label_space import CLASSES_REMEDY, ORIGINS, LabelSpace, are_wnids

SOURCE = ORIGINS["imagenet-real"]
IMAGENET = 1000  # classes
_KEY = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})(?:_n\d{8})?", re.IGNORECASE)
_FORMAT = "a JSON list with a list of class indices for each of the 50,000 validation images"


def read_labels(uri: str, sha256: str | None, classes: int) -> tuple[list[frozenset[int]], str]:
    """The labels of every validation image and the file's sha256.

    Args:
        sha256: refuse any other file.
        classes: of the data set; labels lie below.

    Raises ConfigError when there is no file, DataInvalid when it is another one or not in that format.
    """
    fetch = f"fetch {SOURCE} and set its path as `labels` of the evaluator"
    try:
        data = read_pinned(uri, sha256, fetch)
    except NotFound:
        raise ConfigError(
            f"the labels of ImageNet-ReaL are not at {uri}", expected=_FORMAT, found="no file", remedy=fetch
        ) from None
    try:
        content = json.loads(data)
        labels = [frozenset(item) for item in content]
        whole = isinstance(content, list) and all(
            isinstance(label, int) and label >= 0 for item in labels for label in item
        )
    except (ValueError, TypeError):
        whole = False
    if not whole:
        shown = data[:60].decode(errors="replace")
        raise DataInvalid(
            f"{uri} does not hold the labels of ImageNet-ReaL",
            expected=_FORMAT,
            found=f"{shown}…",
            remedy=fetch,
        )
    highest = max((label for item in labels for label in item), default=-1)
    if highest >= classes:
        raise ConfigError(
            "the data set does not have the classes of the labels of ImageNet-ReaL",
            expected=f"at least {highest + 1} classes (ImageNet-1K's 1000)",
            found=f"{classes}",
            remedy="evaluate on ImageNet-1K",
        )
    return labels, storage.sha256_bytes(data)


def label_order(classes: Sequence[str]) -> list[int]:
    """The data set's class for each of ReaL's labels, which count ImageNet-1K's WordNet ids in their order.

    Raises ConfigError when the class names are neither WordNet ids nor the numbers 0 … 999, or are more than the
    labels count: among the ids of ImageNet-21K the order is another one.
    """
    if are_wnids(classes) and len(classes) <= IMAGENET:
        return sorted(range(len(classes)), key=lambda i: classes[i])
    if len(classes) == IMAGENET and all(name.isdecimal() for name in classes):
        order = sorted(range(IMAGENET), key=lambda i: int(classes[i]))
        if [int(classes[i]) for i in order] == list(range(IMAGENET)):
            return order
    raise ConfigError(
        "the names of the data set's classes do not tell which labels of ImageNet-ReaL they are",
        expected=f"at most {IMAGENET} class folders with WordNet ids such as n01440764, or all the numbers 0 to 999",
        found=f"{len(classes)} classes: {', '.join(list(classes)[:5])}",
        remedy="shard ImageNet's validation images in folders of WordNet ids; a classifier that does not name its "
        f"classes so gets the names with {CLASSES_REMEDY}",
    )


class RealMeter:
    """Takes the logits of batches of ImageNet's validation split, then yields `top1` over the labelled images.

    Args:
        labels, sha256: as `read_labels` returns them.
        key: sample id → its key in the data set, `n…/ILSVRC2012_val_00000001`.
        space: the head's rows of the data set's classes.
        classes: the data set's class names in label order.
        samples: of the whole split, which the counts must add up to.

    Attributes:
        covered, facts, variant, notes: for `Found`; `covered` is known when it has finished.
    """

    variant = "real"

    def __init__(
        self,
        labels: list[frozenset[int]],
        sha256: str,
        key: Callable[[int], str],
        space: LabelSpace,
        classes: Sequence[str],
        *,
        device: str,
        samples: int,
    ) -> None:
        self.real, self.key, self.device, self.samples = labels, key, device, samples
        self.covered, self.facts = 0, {"labels_sha256": sha256, "classes_by": space.how}
        self.notes = (
            [f"predictions among {len(classes)} of the classifier's {space.rows} classes"]
            if space.is_subset
            else []
        )
        # ReaL's label -> the head's row
        self.index = torch.tensor([space.index[i] for i in label_order(classes)], device=device)
        self.counts = torch.zeros(3, dtype=torch.int64)  # samples, those with a label, hits

    def update(self, batch: Any, logits_BK: Tensor) -> None:
        """Count one batch."""
        logits_BK = logits_BK.index_select(1, self.index)
        finite = torch.isfinite(logits_BK).all(1).tolist()
        for sample_id, predicted, known in zip(
            batch.sample_ids.tolist(), logits_BK.argmax(1).tolist(), finite, strict=True
        ):
            labels = self._labels(self.key(sample_id))
            self.counts += torch.tensor([1, bool(labels), known and predicted in labels])

    def finish(self) -> Values:
        """Yield `top1` (percent). Collective: every rank calls it once."""
        self.counts = distributed.all_reduce_sum(self.counts.to(self.device)).cpu()
        total, labelled, hits = self.counts.tolist()
        assert total == self.samples, f"the ranks saw {total} of {self.samples} samples"
        self.covered = labelled
        if not labelled:
            raise DataInvalid("no image of the split has a label in ImageNet-ReaL", remedy=f"see {SOURCE}")
        yield "top1", 100.0 * hits / labelled

    def table(self) -> None:
        """There is none."""

    def _labels(self, key: str) -> frozenset[int]:
        match = _KEY.fullmatch(key)
        number = int(match.group(1)) if match else 0
        if not 1 <= number <= len(self.real):
            raise DataInvalid(
                f"sample '{key}' has no place in the labels of ImageNet-ReaL",
                expected=f"ILSVRC2012_val_00000001 to {len(self.real):08d}",
                found=key,
                remedy="evaluate on the split that was made of ImageNet's validation images, with their file names, "
                f"and with the whole {SOURCE}",
            )
        return self.real[number - 1]
