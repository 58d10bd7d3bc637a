"""Config of an evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.config import Config, not_identity
from stages.data.config import EvalDataConfig


class EvaluateConfig(Config):
    """Top-1, top-5 (percent) and mean cross-entropy of a classifier over a whole split."""

    split: str = "val"
    data: EvalDataConfig = EvalDataConfig()
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the model and its inputs")
    timeout_s: float = not_identity(600.0, gt=0)
