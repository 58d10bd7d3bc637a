"""Config of pre-training. Defaults are Fast-iTPN's where published, else EVA-02's, of which its code is a fork."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from stages.data.config import DataConfig
from stages.data.view import TrainView
from stages.model.config import BackboneConfig, ObjectiveConfig, TeacherConfig, backbone_config
from stages.train.config import LoopConfig, OptimiserConfig, ScheduleConfig


class PretrainConfig(LoopConfig):
    """Masked feature modelling of a backbone against a frozen teacher.

    `backbone` is a size's name, a mapping with `size` and fields to replace, or all fields.
    """

    backbone: BackboneConfig = backbone_config("fast_itpn_base")
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig
    data: DataConfig = DataConfig(view=TrainView(size=224, min_scale=0.08))
    colour_jitter: float = Field(default=0.4, ge=0)  # brightness, contrast, saturation; both views see it
    flip: float = Field(default=0.5, ge=0, le=1)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of the student's input
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    schedule: ScheduleConfig = ScheduleConfig(epochs=1600, warmup_epochs=5)
    optimiser: OptimiserConfig = OptimiserConfig(lr=1.5e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)

    @field_validator("backbone", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return named_backbone(value)


def named_backbone(value: Any) -> Any:
    """A size's name, or a mapping with `size`, as a BackboneConfig; anything else as it is."""
    if isinstance(value, str):
        return backbone_config(value)
    if isinstance(value, dict) and "size" in value:
        return backbone_config(value["size"], **{key: item for key, item in value.items() if key != "size"})
    return value
