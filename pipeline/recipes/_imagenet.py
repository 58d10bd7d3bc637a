"""What the ImageNet recipes share: machines, preflight, and the graph. A recipe file gives the values."""

from __future__ import annotations

from typing import Any

from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes._chain import Machines, at_size, evaluate_step, fan_out, pretrain_step, shard_step
from pipeline.recipes._jobs import Grid, Job, expand
from pipeline.recipes._label_files import label_files
from pipeline.recipes._other_sets import OtherSets, also_on, other_requirements
from pipeline.search import Search
from pipeline.step import Step
from stages.config import Config, not_identity
from stages.data.config import EvalDataConfig
from stages.evaluate.config import (
    Acceleration,
    Classification,
    EvaluateConfig,
    Evaluator,
    Knn,
    Linear,
    Speed,
)
from stages.finetune.config import FinetuneConfig
from stages.pretrain.config import PretrainConfig
from stages.shard.config import ShardConfig
from stages.train.config import CheckpointConfig, WatchConfig

IMAGENET = ShardConfig(name="imagenet-1k", source="", shard_bytes=256 * 2**20)
SAVE = CheckpointConfig(save_every_minutes=20, keep_last=3)
WATCH = WatchConfig(picture_every_steps=2000, tensorboard=True)
READ = EvalDataConfig(loader_workers=6)
SETTINGS = tuple(Acceleration(setting=name) for name in ("off", "migration", "gathering", "both"))
# Accuracy and speed of the model as it is, and at every acceleration: the accuracy-speed curve.
CURVE: tuple[Evaluator, ...] = (
    Classification(),
    *(Classification(acceleration=each) for each in SETTINGS),
    Speed(settings=SETTINGS),
)
WHOLE_IMAGE_FROM = 384  # pixels: the published evaluation crops the centre (0.875) below


class ImageNetRecipe(Config):
    """Pre-training on ImageNet-1K, then fine-tuning jobs side by side, each evaluated.

    `probe` judges the pre-trained features without fine-tuning; `also` names further sets to evaluate on.
    """

    version: str = not_identity("v1")
    data_version: str = not_identity("v1")  # of the sharded data: a new `version` leaves them as they are
    data: ShardConfig = IMAGENET
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    evaluate: EvaluateConfig = EvaluateConfig(data=READ, evaluators=CURVE)
    probe: EvaluateConfig = EvaluateConfig(data=READ, evaluators=(Knn(), Linear()))
    also: OtherSets = OtherSets()
    grid: Grid  # of the fine-tuning jobs
    jobs: tuple[Job, ...] = ()  # further ones
    search: Search = not_identity(Search())  # stops hopeless jobs early: --set search.kind=asha
    gpus: int = not_identity(8, ge=1)  # of pre-training
    min_gpus: int | None = not_identity(None, ge=1)  # as few as this will do for it, while there are no more
    finetune_gpus: int = not_identity(8, ge=1)  # of each fine-tuning job
    evaluate_gpus: int = not_identity(1, ge=1)  # of each evaluation
    cpus_per_gpu: float = not_identity(8.0, gt=0)
    shard_workers: int = not_identity(16, ge=1)


def build_imagenet(name: str, config: ImageNetRecipe) -> list[Step]:
    """shard → pretrain → probe, and one fine-tuning for each job → evaluate."""
    gpu: dict[str, Any] = {"cpus": config.cpus_per_gpu, "gpus": 1.0}
    machines = Machines(
        shard=Resources(workers=config.shard_workers),
        pretrain=Resources(workers=config.gpus, min_workers=config.min_gpus, **gpu),
        finetune=Resources(workers=config.finetune_gpus, **gpu),
        evaluate=Resources(workers=config.evaluate_gpus, **gpu),
    )
    data = shard_step(config.data, config.data_version, machines.shard)
    trained = pretrain_step(name, config.pretrain, data, config.version, machines.pretrain)
    size = config.pretrain.backbone.img_size
    probe = at_size(config.probe, size, WHOLE_IMAGE_FROM)
    probed = evaluate_step(f"{name}-features", probe, data, trained, config.version, machines.evaluate)
    judged = fan_out(
        name,
        config.finetune,
        config.evaluate,
        expand(config.grid, config.jobs),
        {"pretrained": trained},
        data,
        config.version,
        machines,
        whole_image_from=WHOLE_IMAGE_FROM,
    )
    return [*also_on(judged, config.also, config.data_version, machines.shard), probed]


def imagenet_requirements(config: ImageNetRecipe, address: str | None) -> list[preflight.Requirement]:
    """GPUs for the largest step, numbers of them that can share the work, ImageNet, and the teacher."""
    pretrain = Resources(workers=config.gpus, min_workers=config.min_gpus)
    finetune = Resources(workers=config.finetune_gpus)
    return [
        preflight.gpus(
            {
                "gpus" if config.min_gpus is None else "min_gpus": config.min_gpus or config.gpus,
                "finetune_gpus": config.finetune_gpus,
                "evaluate_gpus": config.evaluate_gpus,
            },
            address,
        ),
        preflight.shares("pretrain", pretrain, config.pretrain, config.pretrain.data.streams),
        preflight.shares("finetune", finetune, config.finetune, config.finetune.data.streams),
        preflight.readable(
            "data set",
            config.data.source,
            "--set data.source=URI of ILSVRC2012 as an ImageFolder tree, tar or zip (IMAGENET=URI with make)",
            "shard",
        ),
        preflight.teacher(
            config.pretrain.teacher.uri,
            "--set pretrain.teacher.uri=PATH of CLIP ViT-L/14: OpenAI .pt, or a Hugging Face folder "
            "(TEACHER=PATH with make)",
        ),
        *label_files("evaluate", config.evaluate),
        *label_files("probe", config.probe),
        *other_requirements(config.also),
    ]
