"""Where in the paths of a source the split and the class stand."""

from __future__ import annotations

import numpy as np

from cluster.errors import DataInvalid
from stages.shard.listing import SPLIT_WORDS

_SHOWN = 5  # class folders named in an error


class Layout:
    """Where in a folder's path the split and the class stand. `split_ids` and `classes` are per folder."""

    def __init__(self, folders: list[str], split_names: tuple[str, ...], prefixed: bool = False) -> None:
        self.split_names = split_names
        parts = [folder.split("/", 2) for folder in folders]
        firsts = {p[0] for p in parts}
        seconds = {p[1] for p in parts if len(p) > 1}
        wrapped = len(firsts) == 1 and firsts != {""} and not firsts & set(split_names) and not prefixed
        deep = all(len(p) > 1 for p in parts)
        skip = int(wrapped and (bool(seconds & set(split_names)) or deep))
        self.has_splits = prefixed or bool((seconds if skip else firsts) & set(split_names))
        self.skip, self.strip = skip, skip + self.has_splits
        # `validation/` beside `train/` is `val`, unless that is there too.
        present = seconds if skip else firsts
        words = {name: SPLIT_WORDS.get(name.lower(), name) for name in present - set(split_names)}
        self.aliases = {name: split for name, split in words.items() if split not in present}
        parsed = [self.parse(folder) for folder in folders]
        self.classes = [class_name for _, class_name in parsed]
        self.split_ids = np.array(
            [split if class_name is not None or prefixed else -1 for split, class_name in parsed], np.int8
        )

    def parse(self, folder: str) -> tuple[int, str | None]:
        """Split id (-1 when outside) and class folder."""
        parts = folder.split("/", self.strip + 1) if folder else []
        split = 0
        if self.has_splits:
            name = parts[self.skip] if len(parts) > self.skip else ""
            name = self.aliases.get(name, name)
            split = self.split_names.index(name) if name in self.split_names else -1
        return split, parts[self.strip] if len(parts) > self.strip else None


def refuse_empty_classes(layout: Layout, folders: set[str], uri: str) -> None:
    filled = set(zip(layout.split_ids.tolist(), layout.classes, strict=True))
    empty = set()
    for folder in folders:
        split, class_name = layout.parse(folder)
        if split >= 0 and class_name and not class_name.startswith(".") and (split, class_name) not in filled:
            empty.add(f"{layout.split_names[split]}/{class_name}" if layout.has_splits else class_name)
    if empty:
        raise DataInvalid(
            f"{uri} has {len(empty)} class folder(s) with no image: " + ", ".join(sorted(empty)[:_SHOWN]),
            expected="at least one .jpg, .jpeg or .png in every class folder",
            remedy="remove the folder or add its images",
        )
