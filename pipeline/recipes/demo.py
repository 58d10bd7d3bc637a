"""The whole chain in minutes on two CPU cores, on real images.

    make demo            (or: itpn run demo --root runs/demo)

A Fast-iTPN of 1.4 M parameters is pre-trained on clipart-12 (bundled: 1,751 + 439 images of 96 px, 12 classes)
against clip-micro (bundled: a small real CLIP), then fine-tuned from those weights and from scratch, with two
seeds each, and evaluated; the pre-trained features are judged by themselves too (k-NN, linear probe).
Hardware: 2 CPU cores, 4 GB. What it reaches stands in docs/LOG.md.
"""

from __future__ import annotations

from pydantic import Field

from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes._chain import SCRATCH, Machines, evaluate_step, fan_out, pretrain_step, shard_step
from pipeline.recipes._jobs import Grid, expand
from pipeline.step import Step
from pipeline.version import REPOSITORY
from stages.config import Config, not_identity
from stages.data.config import DataConfig, EvalDataConfig
from stages.data.view import EvalView, TrainView
from stages.evaluate.config import Classification, EvaluateConfig, Knn, Linear, Speed
from stages.finetune.config import FinetuneConfig, MixConfig
from stages.model.config import ObjectiveConfig, TeacherConfig, backbone_config
from stages.pretrain.config import PretrainConfig
from stages.shard.config import ShardConfig
from stages.train.config import CheckpointConfig, OptimiserConfig, ScheduleConfig, WatchConfig

ASSETS = REPOSITORY / "assets"
VIEW = EvalDataConfig(view=EvalView(size=96, crop_pct=1.0))
PLAIN = (0.5, 0.5, 0.5)  # one normalisation throughout: the fine-tuning is too short to adapt to another


class Recipe(Config):
    """The demo's values; `--set` replaces any of them."""

    version: str = not_identity("v1")
    data_version: str = not_identity("v1")  # of the sharded data: a new `version` leaves them as they are
    data: ShardConfig = ShardConfig(
        name="clipart-12", source=str(ASSETS / "clipart-12.tar"), shard_samples=256
    )
    pretrain: PretrainConfig = PretrainConfig(
        backbone=backbone_config("fast_itpn_micro"),
        objective=ObjectiveConfig(fpn_dim=64),
        teacher=TeacherConfig(uri=str(ASSETS / "clip-micro")),
        data=DataConfig(view=TrainView(size=96, min_scale=0.35), streams=8),
        global_batch=64,
        schedule=ScheduleConfig(steps=260, warmup_steps=20, min_lr=1e-5),
        optimiser=OptimiserConfig(lr=2e-3),
        checkpoint=CheckpointConfig(save_every_steps=50),
        watch=WatchConfig(picture_every_steps=65),
    )
    finetune: FinetuneConfig = FinetuneConfig(
        backbone=backbone_config("fast_itpn_micro"),
        data=DataConfig(view=TrainView(size=96, min_scale=0.5), streams=8),
        global_batch=64,
        mean=PLAIN,
        std=PLAIN,
        mix=MixConfig(mixup=0.0, cutmix=0.0),
        random_erasing=0.0,
        schedule=ScheduleConfig(steps=40, warmup_steps=5, min_lr=1e-6),
        optimiser=OptimiserConfig(lr=2e-3, layer_decay=0.9),
        checkpoint=CheckpointConfig(save_every_steps=20),
        watch=WatchConfig(picture_every_steps=20),
    )
    evaluate: EvaluateConfig = EvaluateConfig(
        data=VIEW, evaluators=(Classification(), Speed(batch_sizes=(32,), warmup=2, iterations=10))
    )
    # Of the pre-trained features, without fine-tuning.
    probe: EvaluateConfig = EvaluateConfig(data=VIEW, evaluators=(Knn(), Linear()))
    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)
    pretrain_workers: int = not_identity(2, ge=1)


def build(config: Recipe) -> list[Step]:
    """shard → pretrain → probe, and (pretrained | scratch) × seeds → evaluate."""
    machines = Machines(
        shard=Resources(workers=2),
        pretrain=Resources(workers=config.pretrain_workers),
        finetune=Resources(),
        evaluate=Resources(),
    )
    data = shard_step(config.data, config.data_version, machines.shard)
    trained = pretrain_step("demo", config.pretrain, data, config.version, machines.pretrain)
    probed = evaluate_step("demo-features", config.probe, data, trained, config.version, machines.evaluate)
    jobs = expand(Grid(checkpoint=("pretrained", SCRATCH), seed=config.seeds))
    checkpoints = {"pretrained": trained}
    tuned = fan_out(
        "demo", config.finetune, config.evaluate, jobs, checkpoints, data, config.version, machines
    )
    return [*tuned, probed]


def requirements(config: Recipe, address: str | None) -> list[preflight.Requirement]:
    """The images and the teacher."""
    return [
        preflight.readable(
            "data set",
            config.data.source,
            "--set data.source=PATH (an ImageFolder tree, tar or zip)",
            "shard",
        ),
        preflight.teacher(
            config.pretrain.teacher.uri,
            "--set pretrain.teacher.uri=PATH of a CLIP model",
        ),
    ]
