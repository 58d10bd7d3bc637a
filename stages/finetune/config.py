"""Config of fine-tuning for classification. Defaults are Fast-iTPN B's at 224 (published), less RandAugment."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from stages.config import Config
from stages.data.config import DataConfig
from stages.data.view import TrainView
from stages.model.config import BackboneConfig, backbone_config
from stages.pretrain.config import named_backbone
from stages.train.config import LoopConfig, OptimiserConfig, ScheduleConfig


class MixConfig(Config):
    """Mixup and CutMix; with both, each is chosen half of the time. 0 turns one off; 1 is uniform."""

    mixup: float = Field(default=0.8, ge=0, le=1)  # α of Beta(α, α); above 1 its sampler would not be exact
    cutmix: float = Field(default=1.0, ge=0, le=1)


class FinetuneConfig(LoopConfig):
    """A classifier on a backbone, from a checkpoint or from scratch.

    `backbone` may have another image size than the checkpoint: position embeddings are resized. `train` "head"
    freezes the backbone (linear probe).
    """

    backbone: BackboneConfig = backbone_config("fast_itpn_base")
    split: str = "train"
    data: DataConfig = DataConfig(view=TrainView(size=224, min_scale=0.08))
    train: str = Field(default="all", pattern="^(all|head)$")
    head_init_scale: float = Field(default=0.001, gt=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    mix: MixConfig = MixConfig()
    flip: float = Field(default=0.5, ge=0, le=1)
    colour_jitter: float = Field(default=0.4, ge=0)
    rand_augment: float = Field(
        default=0.0, ge=0, le=10
    )  # magnitude; published: 9, in the place of colour jitter
    random_erasing: float = Field(default=0.25, ge=0, le=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    global_batch: int = Field(default=1024, gt=0)
    schedule: ScheduleConfig = ScheduleConfig(epochs=20, warmup_epochs=3, min_lr=1e-6, warmup_lr=1e-6)
    optimiser: OptimiserConfig = OptimiserConfig(
        lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, layer_decay=0.9
    )

    @field_validator("backbone", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return named_backbone(value)
