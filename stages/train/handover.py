"""What pre-training and fine-tuning ask of their inputs, and hand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError
from stages.artifacts import Artifact, CheckpointRef, DatasetRef, FileInfo, Outcome
from stages.context import StageContext
from stages.data.config import DataConfig
from stages.model.config import BackboneConfig


def training_data(
    stage: str, inputs: Mapping[str, Artifact], view: DataConfig, backbone: BackboneConfig
) -> DatasetRef:
    """The input `data`; raises ConfigError when it is missing, or its view is not of the backbone's image size."""
    data = inputs.get("data")
    if not isinstance(data, DatasetRef):
        raise ConfigError(f"{stage} needs the input 'data'", expected="a data set", found=data and data.kind)
    if view.view.size != backbone.img_size:
        raise ConfigError(
            "the data view and the backbone have different image sizes",
            expected=f"data.view.size = {backbone.img_size}",
            found=view.view.size,
            remedy="set data.view.size, or backbone.img_size",
        )
    return data


def trained(
    result: dict[str, Any], context: StageContext, data: DatasetRef, seed: int, **lineage: Any
) -> Outcome:
    """The outcome of training, from what rank 0 returned; `lineage` are further fields of the CheckpointRef."""
    model = FileInfo(**result["model"])
    return Outcome(
        artifact=CheckpointRef(
            uri=f"{context.out}/{model.path}",
            sha256=model.sha256,
            bytes=model.bytes,
            step=result["optimiser_steps"],
            dataset=data.name,
            data_fingerprint=data.fingerprint,
            seed=seed,
            **lineage,
        ),
        files=[FileInfo(**info) for info in result["files"]],
        metrics=result["headline"],
        notes=result["notes"],
    )
