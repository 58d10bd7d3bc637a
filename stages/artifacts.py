"""The typed records that stages hand to each other: small, JSON, made of paths and facts, never of tensors.

Every URI in them is absolute. `kind` tells them apart when they are read back.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileInfo(_Record):
    """One stored file: its path relative to the step's output folder, size in bytes, sha256 in hex."""

    path: str
    bytes: int
    sha256: str


class DatasetRef(_Record):
    """A sharded data set, named by its manifest."""

    kind: Literal["dataset"] = "dataset"
    name: str
    manifest: str  # URI of the manifest JSON
    sha256: str  # of the manifest's bytes
    fingerprint: str  # of the content: classes, samples, seed; equal on any store and any worker count
    splits: dict[str, int]  # split -> samples
    num_classes: int


class CheckpointRef(_Record):
    """Consolidated weights that `stages.model` loads: safetensors beside their config.

    The lineage fields let a results row be traced without opening anything else.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    uri: str  # URI of model.safetensors; config.json stands beside it
    sha256: str  # of model.safetensors
    bytes: int
    step: int  # optimiser steps taken
    task: Literal["pretrain", "classify"]
    dataset: str
    data_fingerprint: str
    seed: int
    init: Literal["pretrained", "scratch"] = "scratch"
    pretrain: str | None = None  # URI of the checkpoint that the weights started from
    teacher_sha256: str | None = None


class Measurement(_Record):
    """One figure that an evaluator yielded; what is None here is as in its EvaluationRef.

    The config of the evaluator identifies the figure, so it holds everything that decides the value: of a
    speed, the device too.
    """

    metric: str
    value: FiniteFloat
    evaluator: dict | None = None
    samples: int | None = None
    variant: str = ""  # how the model or the labels differ from the plain evaluation: `both 384px`, `real`
    on_data: bool = True  # False: whatever the data, as speed is


class EvaluationRef(_Record):
    """What one evaluation of one checkpoint found. Figures that are not finite are left out."""

    kind: Literal["evaluation"] = "evaluation"
    dataset: str
    split: str
    samples: int
    data_fingerprint: str | None = None  # of the data set that was evaluated on
    evaluator: dict  # the stage's config
    checkpoint: CheckpointRef
    model_fingerprint: str | None = (
        None  # of what its config.json makes of the weights; older records have none
    )
    measurements: list[Measurement]


Artifact = Annotated[DatasetRef | CheckpointRef | EvaluationRef, Field(discriminator="kind")]
_adapter: TypeAdapter[Artifact] = TypeAdapter(Artifact)


def parse_artifact(data: dict) -> Artifact:
    """The artifact that `data` (parsed JSON) describes; raises pydantic.ValidationError if it describes none."""
    return _adapter.validate_python(data)


class Outcome(_Record):
    """What a stage returns: its artifact, the files it wrote (relative to the output folder), headline metrics."""

    artifact: Artifact
    files: list[FileInfo]
    metrics: dict[str, float] = {}
    notes: list[str] = []  # things a person should read: skipped samples, roll-backs, dropped batches
