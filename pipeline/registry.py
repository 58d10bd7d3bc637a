"""The results registry: immutable JSON events, created exclusively, one object each.

    {root}/registry/results/<id>.json       one measured value
    {root}/registry/checkpoints/<id>.json   one finished checkpoint

An event's id is a hash of what it states, so publishing the same record twice adds nothing, and writers
need neither a server nor a lock.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.errors import AlreadyExists, ConfigError, DataInvalid
from pipeline.record import Record
from stages.artifacts import CheckpointRef, EvaluationRef
from stages.config import nearest

SCHEMA = 1
LOWER_IS_BETTER = {"loss", "ece", "latency_p50_ms", "latency_p99_ms", "peak_memory_bytes", "flops"}


class ResultRow(BaseModel):
    """One value: what was measured, on which weights, from which data and code."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    run: str
    step: str
    dataset: str
    split: str
    metric: str
    value: float
    samples: int
    init: str  # pretrained | scratch
    seed: int
    evaluator: dict[str, Any]
    checkpoint: str
    checkpoint_sha256: str
    pretrain: str | None
    training_fingerprint: str | None
    data_fingerprint: str
    code_version: str
    created_at: str


class CheckpointRow(BaseModel):
    """One finished checkpoint and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    run: str
    step: str
    fingerprint: str
    checkpoint: CheckpointRef
    metrics: dict[str, float]
    code_version: str
    created_at: str


class Registry:
    """Appends to and reads the registry under `root` (any URI)."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._uri = storage.join(root, "registry")

    def publish(self, records: list[Record]) -> int:
        """Write the events that these records imply and that are not there yet; returns how many were new."""
        wanted = {
            f"{folder}/{_event_id(row)}.json": row for record in records for folder, row in _events(record)
        }
        present = {item.uri for item in storage.list_files(self._uri)}
        missing = {
            uri: row for path, row in wanted.items() if (uri := storage.join(self._uri, path)) not in present
        }
        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(_append, missing, missing.values()))

    def results(self, **equal: Any) -> list[ResultRow]:
        """The result rows whose fields equal the given ones (`metric="top1"`, `init=None` = any), oldest first.

        Raises ConfigError for a field that rows do not have.
        """
        for name in equal:
            if name not in ResultRow.model_fields:
                raise ConfigError(
                    f"results have no field '{name}'", remedy=nearest(name, list(ResultRow.model_fields))
                )
        rows = self._read("results", ResultRow)
        kept = [r for r in rows if all(v is None or getattr(r, k) == v for k, v in equal.items())]
        return sorted(kept, key=lambda r: (r.created_at, r.step, r.metric))

    def checkpoints(self) -> list[CheckpointRow]:
        """All checkpoint rows, oldest first."""
        return sorted(self._read("checkpoints", CheckpointRow), key=lambda r: (r.created_at, r.step))

    def best(self, metric: str, **equal: Any) -> ResultRow:
        """The best row of `metric`: the highest value, or the lowest for losses, latencies, memory and FLOPs.

        Raises ConfigError when no row has that metric, naming those there are.
        """
        rows = self.results(metric=metric, **equal)
        if not rows:
            metrics = sorted({row.metric for row in self.results()})
            raise ConfigError(
                f"no result with metric '{metric}' under {self.root}",
                remedy=nearest(metric, metrics) if metrics else "run a recipe that evaluates, then ask again",
            )
        pick = min if metric in LOWER_IS_BETTER else max
        return pick(rows, key=lambda row: row.value)

    def _read(self, folder: str, model: type[Any]) -> list[Any]:
        items = storage.list_files(storage.join(self._uri, folder))
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda item: _parse(item.uri, model), items))


def _parse(uri: str, model: type[Any]) -> Any:
    try:
        return model.model_validate(storage.read_json(uri))
    except ValueError as error:
        raise DataInvalid(
            f"registry event {uri} cannot be read",
            found=str(error).splitlines()[0],
            remedy="it was written by another version or by hand; move it out of the registry",
        ) from None


def _append(uri: str, row: BaseModel) -> int:
    try:
        storage.write_exclusive(uri, storage.canonical_json(row.model_dump(mode="json")))
    except AlreadyExists:
        return 0
    return 1


def _event_id(row: BaseModel) -> str:
    return hashlib.sha256(storage.canonical_json(row.model_dump(mode="json"))).hexdigest()[:32]


def _events(record: Record) -> list[tuple[str, BaseModel]]:
    common: dict[str, Any] = {"run": record.recipe, "step": record.step, "code_version": record.code_version}
    artifact = record.artifact
    if isinstance(artifact, CheckpointRef):
        row = CheckpointRow(
            **common,
            fingerprint=record.fingerprint,
            checkpoint=artifact,
            metrics=record.metrics,
            created_at=record.finished_at,
        )
        return [("checkpoints", row)]
    if isinstance(artifact, EvaluationRef):
        checkpoint = artifact.checkpoint
        return [
            (
                "results",
                ResultRow(
                    **common,
                    dataset=artifact.dataset,
                    split=artifact.split,
                    metric=measured.metric,
                    value=measured.value,
                    samples=artifact.samples,
                    init=checkpoint.init,
                    seed=checkpoint.seed,
                    evaluator=artifact.evaluator,
                    checkpoint=checkpoint.uri,
                    checkpoint_sha256=checkpoint.sha256,
                    pretrain=checkpoint.pretrain,
                    training_fingerprint=record.inputs["checkpoint"].fingerprint
                    if "checkpoint" in record.inputs
                    else None,
                    data_fingerprint=checkpoint.data_fingerprint,
                    created_at=record.finished_at,
                ),
            )
            for measured in artifact.measurements
        ]
    return []
