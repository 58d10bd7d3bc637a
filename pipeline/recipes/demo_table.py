"""The demo's model in a table: pretrained or not, averaged weights or the last, two sizes, dense or fast tokens.

    itpn run demo_table --root runs/demo
    itpn results table demo_table --root runs/demo --across checkpoint

Under the root of a finished `make demo` its shards and its pre-training are reused. 24 fine-tunings of 40 steps (each
evaluated twice: the averaged weights and the last ones of one training) take some 25 minutes on two CPU cores.
The fast tokens are migration (half of them leave after a third of the main stage) with gathering in four windows and
8 gathering tokens. What it found stands in docs/LOG.md.
"""

from __future__ import annotations

from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes import demo
from pipeline.recipes._chain import SCRATCH, Machines, fan_out, pretrain_step, shard_step
from pipeline.recipes._jobs import Grid, Job, expand
from pipeline.step import Step
from stages.config import Config, not_identity
from stages.evaluate.config import Classification, EvaluateConfig
from stages.finetune.config import FinetuneConfig
from stages.model.config import BackboneConfig, GatheringConfig, MigrationConfig
from stages.pretrain.config import PretrainConfig
from stages.shard.config import ShardConfig

DEMO = demo.Recipe()


class Recipe(Config):
    """The demo's values with an average over some ten steps, and the table's axes."""

    version: str = not_identity("v1")
    data_version: str = not_identity("v1")  # of the sharded data: a new `version` leaves them as they are
    data: ShardConfig = DEMO.data
    pretrain: PretrainConfig = DEMO.pretrain
    finetune: FinetuneConfig = DEMO.finetune.model_copy(update={"ema_decay": 0.9})
    evaluate: EvaluateConfig = DEMO.evaluate.model_copy(update={"evaluators": (Classification(),)})
    grid: Grid = Grid(
        checkpoint=("pretrained", SCRATCH), resolution=(96, 128), tokens=("dense", "fast"), seed=(0, 1, 2)
    )
    jobs: tuple[Job, ...] = ()
    pretrain_workers: int = not_identity(2, ge=1)


def four_windows(backbone: BackboneConfig) -> BackboneConfig:
    """Fast tokens for small grids, where the documented default would be one window: the whole grid."""
    gathering = GatheringConfig(window=max(1, backbone.grid // 2), tokens=8)
    fast = backbone.model_copy(update={"migration": MigrationConfig(keep=0.5), "gathering": gathering})
    return BackboneConfig.parse(fast.model_dump())


def build(config: Recipe) -> list[Step]:
    """shard → pretrain (the demo's) → one fine-tuning for each job → evaluate its averaged and its last weights."""
    one = Resources()
    machines = Machines(
        shard=Resources(workers=2),
        pretrain=Resources(workers=config.pretrain_workers),
        finetune=one,
        evaluate=one,
    )
    data = shard_step(config.data, config.data_version, machines.shard)
    trained = pretrain_step("demo", config.pretrain, data, config.version, machines.pretrain)
    return fan_out(
        "table",
        config.finetune,
        config.evaluate,
        expand(config.grid, config.jobs),
        {"pretrained": trained},
        data,
        config.version,
        machines,
        accelerate=four_windows,
        weights=("handed on", "last"),
    )


def requirements(config: Recipe, address: str | None) -> list[preflight.Requirement]:
    """What the demo needs."""
    return demo.requirements(
        DEMO.model_copy(update={"data": config.data, "pretrain": config.pretrain}), address
    )
