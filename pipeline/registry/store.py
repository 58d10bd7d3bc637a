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

from cluster import storage
from cluster.errors import ConfigError
from pipeline.record import Record
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
from pipeline.registry.rows import Rows
from stages.config import nearest

LOWER_IS_BETTER = {"loss", "ece", "latency_p50_ms", "latency_p99_ms", "peak_memory_bytes", "flops"}
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
        for name in equal:
            if name not in ResultRow.model_fields:
                raise ConfigError(
                    f"results have no field '{name}'", remedy=nearest(name, list(ResultRow.model_fields))
                )
        rows = self.read("results")
        kept = [r for r in rows if all(v is None or getattr(r, k) == v for k, v in equal.items())]
        return Rows(sorted(kept, key=lambda r: (r.created_at, r.step, r.metric)), "results")

    def checkpoints(self) -> Rows[CheckpointRow]:
        """All checkpoint rows, oldest first."""
        return Rows(sorted(self.read("checkpoints"), key=lambda r: (r.created_at, r.step)), "checkpoints")

    def runs(self) -> Rows[RunRow]:
        """How every step ended, oldest first."""
        return Rows(sorted(self.read("runs"), key=lambda r: (r.created_at, r.step)), "runs")

    def best(self, metric: str, **equal: Any) -> ResultRow:
        """The best row of `metric`: the highest value, or the lowest for losses, latencies, memory and FLOPs.

        Rows of the model as it was trained go before variants of it (other labels, resolution, acceleration),
        unless `variant` is given.

        Raises ConfigError when no row has that metric, naming those there are.
        """
        rows = self.results(metric=metric, **equal)
        if not rows:
            metrics = sorted({row.metric for row in self.results()})
            raise ConfigError(
                f"no result with metric '{metric}' under {self.root}",
                remedy=nearest(metric, metrics) if metrics else "run a recipe that evaluates, then ask again",
            )
        plain = [row for row in rows if not row.variant] if equal.get("variant") is None else rows
        return better_first(plain or rows)[0]

    def ids(self, folder: str) -> dict[str, str]:
        """Event id -> URI of every event in a folder."""
        items = storage.list_files(storage.join(self.uri, folder))
        return {item.uri.rsplit("/", 1)[1].removesuffix(".json"): item.uri for item in items}

    def read(self, folder: str, uris: list[str] | None = None) -> list[Any]:
        """The events of a folder, or those at `uris`. Raises DataInvalid for one that cannot be read."""
        wanted = list(self.ids(folder).values()) if uris is None else uris
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda uri: parse(uri, FOLDERS[folder]), wanted))


def better_first(rows: list[ResultRow]) -> list[ResultRow]:
    """Rows of one metric, the best first; the oldest first among equals."""
    if not rows:
        return []
    sign = 1 if rows[0].metric in LOWER_IS_BETTER else -1
    return sorted(rows, key=lambda row: (not math.isfinite(row.value), sign * row.value, row.created_at))
