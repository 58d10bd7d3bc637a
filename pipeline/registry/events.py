"""The events of the registry: immutable, one JSON object each, named by a hash.

Of checkpoints and runs the hash covers all that the event states. Of a result it covers what identifies the
value: weights, what their description makes of them, evaluator, evaluated data, metric. So the same evaluation,
made again by another recipe, at another time or under another path, adds nothing: the first value stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from cluster import storage
from cluster.errors import AlreadyExists, DataInvalid
from pipeline.record import Record
from stages.artifacts import CheckpointRef, EvaluationRef

SCHEMA = 1
RESULT_SCHEMA = (
    2  # 1 had no evaluator_fingerprint, evaluated_fingerprint and variant; its id covered all the rest
)
ANY_DATA = "any"  # data set and split of a figure that no data decide, as speed


class Event(BaseModel):
    """What every event has; `id` is a hash of its content, or of what identifies it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    run: str
    step: str
    code_version: str
    created_at: str

    @property
    def id(self) -> str:
        return _digest(self._identity())[:32]

    def _identity(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class ResultRow(Event):
    """One value: what was measured, on which weights, from which data and code.

    `data_fingerprint` is of the data that the weights were trained on, `evaluated_fingerprint` of those that the
    value was measured on (None where no data decide it). `variant` is empty for the model as it was trained; it
    tells an acceleration, a resolution or other labels, which rules and tables of results leave aside.
    `model_fingerprint` is of what the weights' config.json makes of them; rows from before it was told have none.
    """

    schema_version: int = RESULT_SCHEMA
    dataset: str
    split: str
    metric: str
    value: float
    samples: int
    init: str  # pretrained | scratch
    seed: int
    variant: str = ""
    evaluator: dict[str, Any]
    evaluator_fingerprint: str  # of `evaluator`; made when it is not given
    evaluated_fingerprint: str | None = None
    checkpoint: str
    checkpoint_sha256: str
    model_fingerprint: str | None = None
    pretrain: str | None
    training_fingerprint: str | None
    data_fingerprint: str

    @model_validator(mode="before")
    @classmethod
    def _with_fingerprint(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("evaluator_fingerprint"):
            return data
        if isinstance(data.get("evaluator"), dict):
            return {"evaluator_fingerprint": _digest(data["evaluator"])} | data
        return data

    def _identity(self) -> dict[str, Any]:
        if self.schema_version == 1:
            new = {"variant", "evaluator_fingerprint", "evaluated_fingerprint", "model_fingerprint"}
            return self.model_dump(mode="json", exclude=new)
        keys = {"checkpoint_sha256", "evaluator_fingerprint", "evaluated_fingerprint", "metric"}
        keys |= {"model_fingerprint"} if self.model_fingerprint else set()  # without it ids stay as they were
        return self.model_dump(mode="json", include=keys)


class CheckpointRow(Event):
    """One finished checkpoint and where it came from."""

    fingerprint: str
    checkpoint: CheckpointRef
    metrics: dict[str, float]


class RunRow(Event):
    """How one step ended: finished, failed (why), skipped because an input failed, or stopped as a hopeless trial."""

    fingerprint: str
    outcome: Literal["finished", "failed", "skipped", "stopped"]
    error: str | None = None
    exit_code: int = 0
    host: str
    wall_s: float = 0.0
    gpu_seconds: float = 0.0


class DeletionRow(Event):
    """The files of a checkpoint were deleted by retention; its record and results stay."""

    checkpoint: str
    checkpoint_sha256: str
    bytes: int
    why: str
    by: str
    host: str


FOLDERS: dict[str, type[Event]] = {
    "results": ResultRow,
    "checkpoints": CheckpointRow,
    "runs": RunRow,
    "deletions": DeletionRow,
}


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
                dataset=artifact.dataset if measured.on_data else ANY_DATA,
                split=artifact.split if measured.on_data else ANY_DATA,
                metric=measured.metric,
                value=measured.value,
                samples=artifact.samples if measured.samples is None else measured.samples,
                init=checkpoint.init,
                seed=checkpoint.seed,
                variant=measured.variant,
                evaluator=artifact.evaluator if measured.evaluator is None else measured.evaluator,
                evaluated_fingerprint=artifact.data_fingerprint if measured.on_data else None,
                checkpoint=checkpoint.uri,
                checkpoint_sha256=checkpoint.sha256,
                model_fingerprint=artifact.model_fingerprint,
                pretrain=checkpoint.pretrain,
                training_fingerprint=trained.fingerprint if trained else None,
                data_fingerprint=checkpoint.data_fingerprint,
            )
            found.append(("results", result))
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(storage.canonical_json(content)).hexdigest()


def results_of(records: Iterable[Record]) -> list[ResultRow]:
    """The result rows that these records imply, in the order of the registry's listing."""
    rows = [row for record in records for _, row in events_of(record) if isinstance(row, ResultRow)]
    return sorted(rows, key=lambda row: (row.created_at, row.step, row.metric))


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
