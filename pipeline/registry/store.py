"""Appends to and reads the registry. The events are the truth; writers need neither a server nor a lock.

    {root}/registry/results/<id>.json       one measured value
    {root}/registry/checkpoints/<id>.json   one finished checkpoint
    {root}/registry/runs/<id>.json          how a step ended
    {root}/registry/aliases/<name>.json     where an alias points, with its history (aliases.py)
    {root}/registry/deletions/<id>.json     files of a checkpoint were deleted
    {root}/registry/{deleted,pins}/…        by which deletion and use agree (deletions.py)
    {root}/registry/delta/{results,…}       a view of the events for SQL engines (delta.py)

An event's id is a hash (events.py), so publishing the same record twice adds nothing.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from cluster.errors import ConfigError
from pipeline.record import Record
from pipeline.registry.evaluated import DATA_FIELDS, data_in, data_names
from pipeline.registry.events import (
    FOLDERS,
    CheckpointRow,
    Event,
    ResultRow,
    RunRow,
    append,
    events_of,
    parse,
)
from pipeline.registry.metrics import direction
from pipeline.registry.rows import Rows, first_of_each, result_rows, select
from stages.config import nearest

_probed: set[str] = set()  # roots whose store was seen to refuse a second create


class Registry:
    """The registry under `root` (any URI)."""

    def __init__(self, root: str) -> None:
        self.root = storage.join(root)
        self.uri = storage.join(root, "registry")

    def publish(self, records: list[Record]) -> int:
        """Write the events that these records imply and that are not there yet; returns how many were new."""
        return self.append([event for record in records for event in events_of(record)])

    def publish_run(self, row: RunRow) -> None:
        """Write how a step ended, where there is no record of it: it failed, or was skipped."""
        self.append([("runs", row)])

    def append(self, events: list[tuple[str, Event]]) -> int:
        """Write events, each into its folder; returns how many were new.

        The first write into a root checks that its store refuses a second create; raises PreflightError
        when it does not, since events and aliases would then overwrite each other in silence.
        """
        wanted = {storage.join(self.uri, folder, f"{row.id}.json"): row for folder, row in events}
        with ThreadPoolExecutor(16) as pool:
            there = list(pool.map(storage.exists, wanted))
            missing = {
                uri: row for (uri, row), is_there in zip(wanted.items(), there, strict=True) if not is_there
            }
            if missing:
                self.check_store()
            return sum(pool.map(append, missing, missing.values()))

    def check_store(self) -> None:
        """Raise PreflightError when the store ignores preconditions; asked once in a process."""
        if self.uri not in _probed:
            storage.probe_preconditions(self.uri)
            _probed.add(self.uri)

    def results(self, **equal: Any) -> Rows[ResultRow]:
        """The result rows whose fields equal the given ones (`metric="top1"`, `init=None` = any), oldest first.

        A list, with `.to_pandas()` and `.to_arrow()`. Raises ConfigError for a field that rows do not have.
        """
        return result_rows(self.results_table(**equal))

    def results_table(self, **equal: Any) -> pa.Table:
        """The same as an Arrow table (rows.py), which is far quicker for many rows.

        What the Delta view has comes from there, where there is one; the rest from the events.
        """
        from pipeline.registry import delta  # imports this module

        return select(delta.current(self.root, "results"), equal=equal)

    def checkpoints(self) -> Rows[CheckpointRow]:
        """All checkpoint rows, oldest first."""
        return Rows(sorted(self.read("checkpoints"), key=lambda r: (r.created_at, r.step)), "checkpoints")

    def runs(self) -> Rows[RunRow]:
        """How every step ended, oldest first."""
        return Rows(sorted(self.read("runs"), key=lambda r: (r.created_at, r.step)), "runs")

    def best(self, metric: str, *, lower_is_better: bool | None = None, **equal: Any) -> ResultRow:
        """The best row of `metric`, among those whose fields equal the given ones.

        Rows of the model as it was trained go before variants of it (other labels, resolution, acceleration),
        unless `variant` is given.

        Raises:
            ConfigError: no row has that metric; nobody knows its direction (metrics.py; say `lower_is_better`); or it
                was measured on different data, whose values say nothing of each other.
        """
        table = self._measured(metric, equal)
        if len(found := data_in(table)) > 1:
            names = data_names(found)
            raise ConfigError(
                f"'{metric}' was measured on different data, and their values cannot be compared",
                found=", ".join(names[data] for data in found),
                remedy="choose: --dataset, --split, --evaluated FINGERPRINT; or the best of each: --by dataset, "
                "--by evaluated_fingerprint",
            )
        return result_rows(first_of_each(table, [], lower=direction(metric, lower_is_better)))[0]

    def best_of_each(
        self, metric: str, by: str, *, lower_is_better: bool | None = None, **equal: Any
    ) -> Rows[ResultRow]:
        """Like `best`, the best for each value of the field `by` and each data that the metric was measured on."""
        if by not in ResultRow.model_fields:
            raise ConfigError(
                f"results have no field '{by}'", remedy=nearest(by, list(ResultRow.model_fields))
            )
        table = self._measured(metric, equal)
        table = table.filter(pc.is_valid(table[by]))
        keys = list(dict.fromkeys((by, *DATA_FIELDS)))
        table = first_of_each(table, keys, lower=direction(metric, lower_is_better))
        return result_rows(table.sort_by([(key, "ascending") for key in keys]))

    def _measured(self, metric: str, equal: dict[str, Any]) -> pa.Table:
        """The rows of a metric; raises ConfigError where there is none, naming what there is."""
        table = self.results_table(metric=metric)
        if not len(table):
            metrics = sorted(set(self.results_table()["metric"].to_pylist()))
            raise ConfigError(
                f"no result with metric '{metric}' under {self.root}",
                remedy=nearest(metric, metrics) if metrics else "run a recipe that evaluates, then ask again",
            )
        found = select(table, equal=equal)
        if not len(found):
            told = {name: str(value) for name, value in equal.items() if value is not None}
            values = {name: sorted(map(str, set(table[name].to_pylist()))) for name in told}
            wrong = [nearest(told[name], values[name]) for name in told if told[name] not in values[name]]
            raise ConfigError(
                f"no result of '{metric}' has "
                + " and ".join(f"{name}={value}" for name, value in told.items()),
                remedy="; ".join(wrong) or "itpn results list",
            )
        return found

    def ids(self, folder: str) -> dict[str, str]:
        """Event id -> URI of every event in a folder."""
        items = storage.list_files(storage.join(self.uri, folder))
        return {item.uri.rsplit("/", 1)[1].removesuffix(".json"): item.uri for item in items}

    def read(self, folder: str, uris: list[str] | None = None) -> list[Any]:
        """The events of a folder, or those at `uris`. Raises DataInvalid for one that cannot be read."""
        wanted = list(self.ids(folder).values()) if uris is None else uris
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda uri: parse(uri, FOLDERS[folder]), wanted))


def better_first(rows: list[ResultRow], *, lower: bool) -> list[ResultRow]:
    """Rows of one metric, the best first; the oldest first among equals."""
    sign = 1 if lower else -1
    return sorted(rows, key=lambda row: (not math.isfinite(row.value), sign * row.value, row.created_at))
