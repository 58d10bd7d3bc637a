"""Reads what a report shows: the registry's events, the records, and the steps that are not finished.

One listing of the root finds everything; what is immutable (events, records, curves of finished steps) is read
once by a `Reader` and kept, so that a live report asks only for what is new.
"""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from cluster import storage
from cluster.errors import DataInvalid, NotFound
from cluster.lease import holder_of
from pipeline.record import Record
from pipeline.registry import CheckpointRow, Registry, ResultRow, RunRow
from pipeline.registry.aliases import Alias, Aliases
from pipeline.registry.deletions import Deletions
from pipeline.registry.lineage import read_record

THREADS = 16
MANY = 1000


@dataclass(frozen=True)
class StepInfo:
    """One step as the root has it.

    `state` is finished, running, failed, skipped, interrupted (its runner is gone; it can be run again) or
    damaged (its record cannot be read). `inputs` maps the names of its inputs to the ids of their steps.
    """

    step: str
    state: str
    record: Record | None = None
    run: str = ""  # name of the recipe
    error: str = ""
    exit_code: int = 0
    ended_at: str = ""
    wall_s: float | None = None
    gpu_seconds: float | None = None
    host: str = ""
    fingerprint: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.step.split("/")[0]


@dataclass(frozen=True)
class Snapshot:
    """Everything a report shows but curves and pictures, which pages read when they are made."""

    root: str
    results: list[ResultRow]
    checkpoints: list[CheckpointRow]
    steps: dict[str, StepInfo]
    aliases: dict[str, Alias]
    deleted: dict[str, str]  # URI of a checkpoint whose files were deleted -> when, by whom and why
    files: dict[str, list[storage.ObjectInfo]]  # step -> the objects in its output folder

    def aliases_of(self, step: str, sha256: str) -> list[str]:
        """Names of the aliases that point at these weights."""
        current = {name: alias.current for name, alias in sorted(self.aliases.items())}
        return [n for n, move in current.items() if (move.step, move.checkpoint_sha256) == (step, sha256)]


class Reader:
    """Reads one root again and again.

    Args:
        root: URI under which every output lives.
    """

    def __init__(self, root: str) -> None:
        self.registry = Registry(root)
        self.root = self.registry.root
        self._events: dict[str, Any] = {}  # by URI
        self._records: dict[str, Record] = {}

    def snapshot(self) -> Snapshot:
        """The root as it is now. Raises StorageUnavailable, or DataInvalid for a broken event."""
        events: dict[str, list[str]] = defaultdict(list)
        files: dict[str, list[storage.ObjectInfo]] = defaultdict(list)
        for item in storage.list_files(self.root):
            parts = item.uri.removeprefix(self.root + "/").split("/")
            if parts[0] == "registry":
                if len(parts) == 3 and parts[2].endswith(".json"):
                    events[parts[1]].append(item.uri)
            elif len(parts) > 3:
                files["/".join(parts[:3])].append(item)
        results = self._read("results", events["results"])
        checkpoints = self._read("checkpoints", events["checkpoints"])
        runs = self._read("runs", events["runs"])
        return Snapshot(
            root=self.root,
            results=sorted(results, key=lambda r: (r.created_at, r.step, r.metric)),
            checkpoints=sorted(checkpoints, key=lambda r: (r.created_at, r.step)),
            steps=self._steps(files, sorted(runs, key=lambda r: r.created_at), checkpoints),
            aliases=Aliases(self.registry).all() if events["aliases"] else {},
            deleted=self._deleted() if events["deleted"] else {},
            files=dict(files),
        )

    def _deleted(self) -> dict[str, str]:
        gone = Deletions(self.registry).done()
        return {uri: f"deleted {d.at[:16]} by {d.by}@{d.host}: {d.why}" for uri, d in gone.items()}

    def _read(self, folder: str, uris: list[str]) -> list[Any]:
        new = [uri for uri in uris if uri not in self._events]
        if (
            folder == "results" and len(new) > MANY
        ):  # a view, where there is one, is far quicker than so many events
            by_uri = {
                storage.join(self.registry.uri, folder, f"{r.id}.json"): r for r in self.registry.results()
            }
            self._events |= {uri: by_uri[uri] for uri in new if uri in by_uri}
            new = [uri for uri in new if uri not in by_uri]
        self._events |= zip(new, self.registry.read(folder, new), strict=True)
        return [self._events[uri] for uri in uris]

    def _steps(
        self,
        files: dict[str, list[storage.ObjectInfo]],
        runs: list[RunRow],
        checkpoints: list[CheckpointRow],
    ) -> dict[str, StepInfo]:
        names = {
            step: {item.uri.removeprefix(storage.join(self.root, step) + "/") for item in items}
            for step, items in files.items()
        }
        begun = [step for step, found in names.items() if found & {"record.json", "plan.json"}]
        last = {row.step: row for row in runs}
        with ThreadPoolExecutor(THREADS) as pool:
            infos = list(pool.map(lambda step: self._begun(step, names[step], last.get(step)), begun))
        steps = {info.step: info for info in infos}
        for step, row in last.items():
            if step not in steps:  # it never began here, or its folder is gone
                steps[step] = _from_row(row, row.outcome)
        weights_of = {row.checkpoint.uri: row.step for row in checkpoints}
        made_by = {info.fingerprint: info.step for info in steps.values() if info.fingerprint}
        for step, info in steps.items():
            taken_in = weights_of.get(str(info.record.config.get("uri"))) if info.record else None
            if taken_in:
                steps[step] = replace(info, inputs=info.inputs | {"weights": taken_in})
            if not info.record and info.inputs:  # a plan knows its inputs by their fingerprints
                known = {name: made_by[found] for name, found in info.inputs.items() if found in made_by}
                steps[step] = replace(info, inputs=known)
        return dict(sorted(steps.items()))

    def _begun(self, step: str, names: set[str], row: RunRow | None) -> StepInfo:
        out = storage.join(self.root, step)
        if "record.json" in names:
            try:
                record = self._records.get(step) or read_record(self.root, step)
            except (NotFound, DataInvalid) as error:
                return StepInfo(step, "damaged", error=str(error))
            self._records[step] = record
            return _from_record(record)
        plan = _json(storage.join(out, "plan.json"))
        identity = plan.get("identity") if isinstance(plan.get("identity"), dict) else {}
        common: dict[str, Any] = {
            "fingerprint": str(plan.get("fingerprint", "")),
            "inputs": dict((identity or {}).get("inputs") or {}),
            "progress": _json(storage.join(out, "progress.json")) if "progress.json" in names else {},
        }
        if any(name.startswith("lease/") for name in names):
            holder = holder_of(storage.join(out, "lease"))
            if holder is not None:
                return StepInfo(step, "running", run=row.run if row else "", host=holder.host, **common)
        if "failure.json" in names:
            failure = _json(storage.join(out, "failure.json"))
            common |= {"error": str(failure.get("error", "")), "ended_at": str(failure.get("at", ""))}
            common |= {"host": str(failure.get("host", "")), "exit_code": failure.get("exit_code", 1)}
            common |= {"wall_s": row.wall_s if row and row.outcome == "failed" else None}
            return StepInfo(step, "failed", run=row.run if row else "", **common)
        if row and row.outcome != "finished":
            return replace(_from_row(row, row.outcome), **common)
        return StepInfo(step, "interrupted", run=row.run if row else "", **common)


def metric_lines(snapshot: Snapshot, info: StepInfo) -> list[dict[str, Any]]:
    """The lines that a training wrote (see stages/train/metrics.py), oldest first; [] when it wrote none.

    A finished one has them in one file. Of an unfinished one those up to its newest checkpoint are there.
    """
    out = storage.join(snapshot.root, info.step)
    if info.record:
        paths = [found.path for found in info.record.files if found.path.endswith("/metrics.jsonl")]
    else:
        names = [item.uri.removeprefix(out + "/") for item in snapshot.files.get(info.step, [])]
        manifests = [n for n in names if n.count("/") == 1 and n.startswith("checkpoints/")]
        newest = _json(storage.join(out, max(manifests))) if manifests else {}
        paths = [part["path"] for part in newest.get("metrics", [])]
        paths += sorted(name for name in names if name.endswith("-diverged.jsonl"))
    lines = []
    for path in paths:
        try:
            text = storage.read_bytes(storage.join(out, path)).decode()
            lines += [line for line in map(json.loads, text.splitlines()) if isinstance(line, dict)]
        except (NotFound, ValueError):
            continue  # gone or broken: the page shows the rest
    return lines


def pictures(snapshot: Snapshot, info: StepInfo) -> dict[int, str]:
    """Training step -> URI of the picture taken there; of several attempts the latest."""
    prefix = storage.join(snapshot.root, info.step, "pictures") + "/"
    found: dict[int, storage.ObjectInfo] = {}
    for item in snapshot.files.get(info.step, []):
        number = item.uri.removeprefix(prefix).split("-")[0]
        if item.uri.startswith(prefix) and item.uri.endswith(".png") and number.isdecimal():
            known = found.get(int(number))
            if known is None or item.mtime >= known.mtime:
                found[int(number)] = item
    return {number: found[number].uri for number in sorted(found)}


def _from_record(record: Record) -> StepInfo:
    return StepInfo(
        record.step,
        "finished",
        record=record,
        run=record.recipe,
        ended_at=record.finished_at,
        wall_s=record.wall_s,
        gpu_seconds=record.gpu_seconds,
        host=record.host,
        fingerprint=record.fingerprint,
        inputs={name: needed.step for name, needed in record.inputs.items()},
    )


def _from_row(row: RunRow, state: str) -> StepInfo:
    return StepInfo(
        row.step,
        state,
        run=row.run,
        error=row.error or "",
        exit_code=row.exit_code,
        ended_at=row.created_at,
        wall_s=row.wall_s or None,
        gpu_seconds=row.gpu_seconds,
        host=row.host,
        fingerprint=row.fingerprint,
    )


def _json(uri: str) -> dict[str, Any]:
    """A small object that only informs; {} when it is gone or cannot be read."""
    try:
        found = storage.read_json(uri)
    except (NotFound, DataInvalid, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
