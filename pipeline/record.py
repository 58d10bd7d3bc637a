"""The record written last beside every finished output: no record, no output.

`plan.json` is written before a step first runs, so that training checkpoints of an unfinished step are never
continued under another config; `record.json`, created exclusively, commits it. Both hold the fingerprint;
one that differs from the step's is drift: an error, never a silent redo. A step that left no checkpoint (it
failed on its config, or on its data) may be begun anew under another config.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.errors import AlreadyExists, DataInvalid, DriftError
from pipeline.step import Step
from stages.artifacts import Artifact, FileInfo

SCHEMA = 1
# Stands for the sha256 of a file that is not there, in the config of a step that was planned without it. A finished
# step does not need the file again: whatever was recorded for it counts as the same.
NOT_THERE = "file not there"


class InputRef(BaseModel):
    """One input of a finished step."""

    model_config = ConfigDict(frozen=True)
    step: str
    fingerprint: str


class Record(BaseModel):
    """Everything about one finished step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    step: str
    fingerprint: str
    identity: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, InputRef]
    artifact: Artifact
    files: list[FileInfo]
    metrics: dict[str, float]
    notes: list[str]
    recipe: str
    attempt: str
    lease_token: int
    code_version: str
    libraries: dict[str, str]
    host: str
    workers: int
    started_at: str  # ISO 8601, UTC
    finished_at: str
    wall_s: float
    cpu_seconds: float
    gpu_seconds: float


def record_uri(root: str, step: Step) -> str:
    return storage.join(step.output(root), "record.json")


def load(root: str, step: Step) -> Record | None:
    """The step's record, or None while it is unfinished. Raises DriftError when it was made from another config."""
    uri = record_uri(root, step)
    if not storage.exists(uri):
        return None
    try:
        record = Record.model_validate(storage.read_json(uri))
    except ValueError as error:
        raise DataInvalid(
            f"the record of '{step.id}' cannot be read",
            found=f"{uri}: {str(error).splitlines()[0]}",
            remedy="it was not written by this version; restore it, or move the folder away to run the step again",
        ) from None
    _refuse_drift(step, record.fingerprint, record.identity, uri)
    return record


def begin(root: str, step: Step) -> None:
    """Write the plan of a step that is about to run; call it with the step's lease held.

    Raises DriftError when the step was begun under another config and left checkpoints.
    """
    uri = _plan_uri(root, step)
    plan = {"fingerprint": step.fingerprint, "identity": step.identity}
    try:
        storage.write_json_exclusive(uri, plan)
    except AlreadyExists:
        check_plan(root, step)
        storage.overwrite(uri, storage.canonical_json(plan))


def check_plan(root: str, step: Step) -> None:
    """Raise DriftError when the step was begun under another config and left checkpoints."""
    uri = _plan_uri(root, step)
    if storage.exists(uri):
        begun = storage.read_json(uri)
        if storage.list_files(storage.join(step.output(root), "checkpoints"), most=1):
            _refuse_drift(step, begun["fingerprint"], begun["identity"], uri)


def _plan_uri(root: str, step: Step) -> str:
    return storage.join(step.output(root), "plan.json")


def commit(root: str, step: Step, record: Record) -> None:
    """Write the record, the commit mark. Raises AlreadyExists when another attempt was first."""
    storage.write_exclusive(record_uri(root, step), storage.canonical_json(record.model_dump(mode="json")))


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two JSON values differ, as (dotted path, old, new); a missing one is None.

    Lists are compared as a whole. A new value of NOT_THERE agrees with any hash.
    """
    if _agree(old, new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [(path, old, new)]


def _agree(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_agree(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_agree, old, new))
    return old == new or (new == NOT_THERE and isinstance(old, str))


def _refuse_drift(step: Step, fingerprint: str, identity: dict[str, Any], uri: str) -> None:
    if fingerprint == step.fingerprint or _agree(identity, step.identity):
        return
    lines = [f"{path}: {old!r} -> {new!r}" for path, old, new in differences(identity, step.identity)]
    # The data need not be made anew with the rest, nor a training for another look at it.
    setting = "data_version" if step.kind == "shard" else "version"
    measured = step.inputs.get("checkpoint") if step.kind == "evaluate" else None
    beside = f"; `itpn evaluate {measured.id}` measures in other ways beside this" if measured else ""
    raise DriftError(
        f"'{step.id}' was made from another config ({uri})",
        expected="the config it was made from",
        found="\n            ".join(lines),
        remedy=f"set the value back, or make a new output beside it with --set {setting}=<new name>{beside}",
    )
