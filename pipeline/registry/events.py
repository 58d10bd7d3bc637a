"""The events of the registry: immutable, one JSON object each, named by a hash of what they state."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.errors import AlreadyExists, DataInvalid
from pipeline.record import Record
from stages.artifacts import CheckpointRef, EvaluationRef

SCHEMA = 1


class Event(BaseModel):
    """What every event has; `id` is a hash of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    run: str
    step: str
    code_version: str
    created_at: str

    @property
    def id(self) -> str:
        return hashlib.sha256(storage.canonical_json(self.model_dump(mode="json"))).hexdigest()[:32]


class ResultRow(Event):
    """One value: what was measured, on which weights, from which data and code."""

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


class CheckpointRow(Event):
    """One finished checkpoint and where it came from."""

    fingerprint: str
    checkpoint: CheckpointRef
    metrics: dict[str, float]


class RunRow(Event):
    """How one step ended: finished, failed (why), or skipped because an input failed."""

    fingerprint: str
    outcome: Literal["finished", "failed", "skipped"]
    error: str | None = None
    exit_code: int = 0
    host: str
    wall_s: float = 0.0
    gpu_seconds: float = 0.0


FOLDERS: dict[str, type[Event]] = {"results": ResultRow, "checkpoints": CheckpointRow, "runs": RunRow}


def events_of(record: Record) -> list[tuple[str, Event]]:
    """The events that a step's record implies, each with its folder."""
    common: dict[str, Any] = {"run": record.recipe, "step": record.step, "code_version": record.code_version}
    common["created_at"] = record.finished_at
    run = RunRow(
        **common,
        fingerprint=record.fingerprint,
        outcome="finished",
        host=record.host,
        wall_s=record.wall_s,
        gpu_seconds=record.gpu_seconds,
    )
    artifact = record.artifact
    found: list[tuple[str, Event]] = [("runs", run)]
    if isinstance(artifact, CheckpointRef):
        row = CheckpointRow(
            **common, fingerprint=record.fingerprint, checkpoint=artifact, metrics=record.metrics
        )
        found.append(("checkpoints", row))
    if isinstance(artifact, EvaluationRef):
        checkpoint = artifact.checkpoint
        trained = record.inputs.get("checkpoint")
        for measured in artifact.measurements:
            result = ResultRow(
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
                training_fingerprint=trained.fingerprint if trained else None,
                data_fingerprint=checkpoint.data_fingerprint,
            )
            found.append(("results", result))
    return found


def append(uri: str, row: BaseModel) -> int:
    """Create the event's object; 0 when it is there already."""
    try:
        storage.write_exclusive(uri, storage.canonical_json(row.model_dump(mode="json")))
    except AlreadyExists:
        return 0
    return 1


def parse(uri: str, model: type[Any]) -> Any:
    """Read one event; raises DataInvalid, naming it, when it is none."""
    try:
        return model.model_validate(storage.read_json(uri))
    except ValueError as error:
        raise DataInvalid(
            f"registry event {uri} cannot be read",
            found=str(error).splitlines()[0],
            remedy="it was written by another version or by hand; move it out of the registry",
        ) from None
