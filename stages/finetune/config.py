"""Config of fine-tuning for classification. Defaults are Fast-iTPN B's at 224 (published), less RandAugment."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from stages.config import Config
from stages.data.config import DataConfig
from stages.data.view import TrainView
from stages.model.config import BackboneConfig, backbone_config
from stages.pretrain.config import named_backbone
from stages.train.config import LoopConfig, OptimiserConfig, ScheduleConfig

_MEANS = {
    "optimiser", "schedule", "global_batch", "engine", "guard", "checkpoint", "watch", "seed", "ema_decay",
    "head_init_scale",
}  # fmt: skip


class MixConfig(Config):
    """Mixup and CutMix; with both, each is chosen half of the time. 0 turns one off; 1 is uniform.

    They mix a sample with the next of its stream, so `data.streams` times 2 must divide `global_batch`, and
    `engine.micro_batch` must be even: then what a step sees depends neither on the ranks nor on the micro-batch.
    """

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

    def objective(self) -> dict[str, Any]:
        """What decides the scale of the training loss; losses of configs that differ here cannot be compared.

        All of the identity, less what only says how the loss is made smaller. The architecture is in it, and with it
        drop path, which makes a training loss larger on purpose.
        """
        found = {name: value for name, value in self.identity().items() if name not in _MEANS}
        return found | {"data": {"view": found["data"]["view"]}}

    @field_validator("backbone", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return named_backbone(value)

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> Self:
        if not (self.mix.mixup or self.mix.cutmix):
            return self
        pairs, batch, micro = 2 * self.data.streams, self.global_batch, self.engine.micro_batch
        why = "mix.mixup and mix.cutmix mix pairs of neighbours"
        if batch % pairs:
            below, above = batch // pairs * pairs, -(-batch // pairs) * pairs
            near = " or ".join(str(n) for n in (below, above) if n)
            raise ValueError(
                f"{why}: global_batch must be a multiple of 2 x data.streams = {pairs}, so {near} (found {batch}); "
                "or lower data.streams, or turn both off with 0"
            )
        if micro is not None and micro % 2:
            even = [n for n in range(2, batch + 1, 2) if batch % n == 0]
            below, above = (
                max((n for n in even if n < micro), default=0),
                min((n for n in even if n > micro), default=0),
            )
            near = " or ".join(str(n) for n in (below, above) if n)
            raise ValueError(
                f"{why}: engine.micro_batch must be even, so {near} (found {micro}); or turn both off"
            )
        return self
