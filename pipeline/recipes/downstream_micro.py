"""The demo's model (1.4 M parameters), fine-tuned from its pre-training at two sizes on CPUs.

    itpn finetune pretrain/demo/v1 --root runs/demo
    itpn finetune pretrain/demo/v1 --root runs/demo --set 'grid.resolution=[96]' --set 'grid.lr=[1e-3,2e-3,4e-3]'

Hardware: one CPU core for each job. The data are the demo's, which its pre-training was made of.
Expected: nothing published; what `make demo` reaches stands in docs/LOG.md. The values are the demo's.
"""

from __future__ import annotations

from pydantic import Field

from pipeline import preflight
from pipeline.recipes import demo
from pipeline.recipes._downstream import DownstreamRecipe, build_downstream, from_checkpoints_requirements
from pipeline.recipes._jobs import Grid
from pipeline.step import Step
from stages.adopt.config import AdoptConfig
from stages.config import not_identity
from stages.evaluate.config import EvaluateConfig
from stages.finetune.config import FinetuneConfig
from stages.shard.config import ShardConfig

DEMO = demo.Recipe()


class Recipe(DownstreamRecipe):
    """The demo's fine-tuning and evaluation, without a GPU."""

    data: ShardConfig = DEMO.data
    checkpoints: dict[str, AdoptConfig] = Field(default={"micro": AdoptConfig()}, min_length=1)
    finetune: FinetuneConfig = DEMO.finetune
    evaluate: EvaluateConfig = DEMO.evaluate
    probe: EvaluateConfig | None = DEMO.probe
    grid: Grid = Grid(resolution=(96, 128), seed=(0,))
    gpus_per_worker: float = not_identity(0.0, ge=0)
    finetune_workers: int = not_identity(1, ge=1)
    shard_workers: int = not_identity(2, ge=1)


def build(config: Recipe) -> list[Step]:
    """shard, import → fine-tune at each resolution → evaluate."""
    return build_downstream(config)


def requirements(config: Recipe, address: str | None) -> list[preflight.Requirement]:
    """The data set and the checkpoint; GPUs only where they are asked for."""
    return from_checkpoints_requirements(config, address)
