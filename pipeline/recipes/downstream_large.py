"""Fast-iTPN L (312 M parameters): fine-tuned on ImageNet-1K from a given checkpoint, at the published resolutions.

    make finetune CHECKPOINT=/weights/fast_itpn_large.pth ROOT=s3://bucket/itpn IMAGENET=s3://bucket/ILSVRC2012.tar
    itpn run downstream_large --root … --set checkpoints.large.uri=… --set checkpoints.large.sha256=… \
      --set data.source=… --set 'grid.lr=[5e-5,1e-4]' --set 'grid.seed=[0,1,2]'

Hardware: 8 GPUs with 40 GB or more for each job (`finetune_workers`).
Expected: the published top-1, 89.5 % at 640 pixels (pre-trained at 256).
"""

from __future__ import annotations

from pydantic import Field

from pipeline import preflight
from pipeline.recipes import pretrain_large
from pipeline.recipes._downstream import DownstreamRecipe, build_downstream, from_checkpoints_requirements
from pipeline.recipes._jobs import Grid
from pipeline.step import Step
from stages.adopt.config import AdoptConfig
from stages.finetune.config import FinetuneConfig


class Recipe(DownstreamRecipe):
    """The fine-tuning of `pretrain_large`, whose docstring says which values are published."""

    checkpoints: dict[str, AdoptConfig] = Field(default={"large": AdoptConfig()}, min_length=1)
    finetune: FinetuneConfig = pretrain_large.Recipe().finetune
    grid: Grid = Grid(resolution=(640,), seed=(0,))


def build(config: Recipe) -> list[Step]:
    """shard, import → fine-tune at each resolution → evaluate."""
    return build_downstream(config)


def requirements(config: Recipe, address: str | None) -> list[preflight.Requirement]:
    """GPUs, the data set, the checkpoint."""
    return from_checkpoints_requirements(config, address)
