"""Fast-iTPN T (24 M parameters): fine-tuned on ImageNet-1K from a given checkpoint, at the published resolutions.

    make finetune CHECKPOINT=/weights/fast_itpn_tiny.pth ROOT=s3://bucket/itpn IMAGENET=s3://bucket/ILSVRC2012.tar
    itpn run downstream_tiny --root … --set checkpoints.tiny.uri=… --set checkpoints.tiny.sha256=… \
      --set data.source=… --set 'grid.lr=[5e-5,1e-4]' --set 'grid.seed=[0,1,2]'

Hardware: 8 GPUs with 40 GB or more for each job (`finetune_workers`).
Expected: the published top-1, 85.1 % at 224 pixels, 86.2 % at 384, 86.5 % at 512.
Higher resolutions than the smallest are fine-tuned with its values, since theirs are unpublished.
"""

from __future__ import annotations

from pydantic import Field

from pipeline import preflight
from pipeline.recipes import pretrain_tiny
from pipeline.recipes._downstream import DownstreamRecipe, build_downstream, from_checkpoints_requirements
from pipeline.recipes._jobs import Grid
from pipeline.step import Step
from stages.adopt.config import AdoptConfig
from stages.finetune.config import FinetuneConfig


class Recipe(DownstreamRecipe):
    """The fine-tuning of `pretrain_tiny`, whose docstring says which values are published."""

    checkpoints: dict[str, AdoptConfig] = Field(default={"tiny": AdoptConfig()}, min_length=1)
    finetune: FinetuneConfig = pretrain_tiny.Recipe().finetune
    grid: Grid = pretrain_tiny.Recipe().grid


def build(config: Recipe) -> list[Step]:
    """shard, import → fine-tune at each resolution → evaluate."""
    return build_downstream(config)


def requirements(config: Recipe, address: str | None) -> list[preflight.Requirement]:
    """GPUs, the data set, the checkpoint."""
    return from_checkpoints_requirements(config, address)
