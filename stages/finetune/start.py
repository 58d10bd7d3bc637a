"""The weights that a fine-tuning starts from: the backbone of any checkpoint, and the head's rows by class name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cluster.errors import ConfigError
from stages.data.class_names import repeated
from stages.model import load_backbone_into
from stages.model.files import local_copy
from stages.model.io import read_described

HEAD = ("head.weight", "head.bias")


def start_from(module: Any, uri: str, sha256: str, classes: Sequence[str]) -> list[str]:
    """Load a checkpoint into a classifier and return what a person should know of it.

    Position tables are resized to the module's grid. Of a classifier that names its classes, the head's rows of
    the classes that both have are copied by name (21K → 1K: by WordNet id), the others keep their initial values.
    Of one that does not, the head is taken when it has as many rows, as the published fine-tuning does.

    Args:
        module: the classifier to fill.
        uri: weights in our layout, or a published file.
        sha256: what the file must be.
        classes: names of the module's classes in index order.

    Raises DataInvalid when the file is another one, or its backbone does not fit; ConfigError when a class that
    both have is named twice.
    """
    with local_copy(uri, sha256=sha256) as path:
        state, config = read_described(uri, path)
    names = config.get("classes") if config else None
    head = {name: state.pop(name) for name in HEAD if name in state} if names is not None else {}
    report = load_backbone_into(module, state)
    notes = []
    if report.resized:
        size = module.config.img_size
        notes.append(f"resized to {size} px: {', '.join(report.resized)}")
    if names is not None:
        notes.append(_remap(module, head, names, classes))
    elif any(name in state for name in HEAD):
        fits = not set(report.dropped) & set(HEAD)
        notes.append(
            f"head: taken as it is, {len(classes)} classes (the checkpoint does not name its own)"
            if fits
            else f"head: initialised anew for {len(classes)} classes (the checkpoint has {len(state[HEAD[0]])})"
        )
    return notes


@torch.no_grad()
def _remap(module: Any, head: dict[str, Tensor], theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Copy the head's rows of the classes that both have; returns the note."""
    if list(theirs) == list(ours):
        both = [(index, index) for index in range(len(ours))]
    else:
        twice = [name for name in repeated(theirs) + repeated(ours) if name in theirs and name in ours]
        if twice:
            raise ConfigError(
                "classes of the checkpoint's head and of the data set cannot be told apart by name",
                expected="different names",
                found=f"repeated: {', '.join(twice[:5])}",
                remedy="fine-tune on class folders with WordNet ids, or from a checkpoint without class names",
            )
        row = {name: index for index, name in enumerate(theirs)}
        both = [(index, row[name]) for index, name in enumerate(ours) if name in row]
    if both:
        to, source = (torch.tensor(part) for part in zip(*both, strict=True))
        for name, value in head.items():
            target = module.get_parameter(name)
            target[to] = value[source].to(target.dtype)
    return (
        f"head: {len(both)} of {len(ours)} classes copied by name, {len(ours) - len(both)} initialised anew"
    )
