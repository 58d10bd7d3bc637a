"""On which data a value was measured: only values of the same data may be compared.

A data set's name is a name; its content is `evaluated_fingerprint`. Sharding again from other files, or under another
version, keeps the name and changes the content. Values of the first schema have no fingerprint: their data are
unknown, and equal to no others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipeline.registry.events import ResultRow

DATA_FIELDS = ("dataset", "split", "evaluated_fingerprint")
DIGITS = 8  # of a fingerprint, where a name alone does not tell data apart

Data = tuple[str, str, str | None]


def data_of(row: ResultRow) -> Data:
    """Data set, split and fingerprint that a value was measured on."""
    return row.dataset, row.split, row.evaluated_fingerprint


def data_in(table: pa.Table) -> list[Data]:
    """The different data in a table of results, sorted by name."""
    groups = table.select(list(DATA_FIELDS)).group_by(list(DATA_FIELDS)).aggregate([])
    found = [(row["dataset"], row["split"], row["evaluated_fingerprint"]) for row in groups.to_pylist()]
    return sorted(found, key=_order)


def data_names(found: Iterable[Data]) -> dict[Data, str]:
    """`DATASET/SPLIT` for each; with the first digits of the fingerprint where equal names are different data."""
    distinct = sorted(set(found), key=_order)
    names: dict[Data, str] = {}
    for data in distinct:
        dataset, split, fingerprint = data
        name = dataset if dataset == split else f"{dataset}/{split}"
        if sum(other[:2] == data[:2] for other in distinct) > 1:
            name += f" ({fingerprint[:DIGITS] if fingerprint else 'unknown data'})"
        names[data] = name
    return names


def clashing(found: Iterable[Data]) -> list[str]:
    """The names under which there are different data."""
    distinct: dict[tuple[str, str], set[Any]] = {}
    for dataset, split, fingerprint in found:
        distinct.setdefault((dataset, split), set()).add(fingerprint)
    return sorted(f"{dataset}/{split}" for (dataset, split), all_ in distinct.items() if len(all_) > 1)


def _order(data: Data) -> tuple[str, str, str]:
    return data[0], data[1], data[2] or ""
