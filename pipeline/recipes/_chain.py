"""The graph that every recipe shares: shard → pretrain → fine-tune jobs side by side → evaluate each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.errors import ConfigError
from cluster.resources import Resources
from pipeline.recipes._jobs import Job, configured, labels
from pipeline.recipes._label_files import pinned
from pipeline.step import Step
from stages.adopt.config import AdoptConfig, LastConfig
from stages.adopt.stage import run as adopt
from stages.adopt.stage import run_last as last_weights
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.stage import run as evaluate
from stages.finetune.config import FinetuneConfig
from stages.finetune.stage import run as finetune
from stages.model.config import BackboneConfig, accelerated
from stages.pretrain.config import PretrainConfig
from stages.pretrain.stage import run as pretrain
from stages.shard.config import ShardConfig
from stages.shard.stage import run as shard

SCRATCH = "scratch"  # the name of no checkpoint
Weights = Literal["handed on", "last"]


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Resources of each kind of step."""

    shard: Resources
    pretrain: Resources
    finetune: Resources
    evaluate: Resources


def shard_step(config: ShardConfig, version: str, resources: Resources) -> Step:
    """Shards the data set that the config names."""
    return Step(kind="shard", name=config.name, version=version, fn=shard, config=config, resources=resources)


def evaluate_step(
    name: str, config: EvaluateConfig, data: Step, checkpoint: Step, version: str, resources: Resources
) -> Step:
    """Evaluates the weights that `checkpoint` hands on."""
    return Step(
        kind="evaluate",
        name=name,
        version=version,
        fn=evaluate,
        config=pinned(config),
        inputs={"data": data, "checkpoint": checkpoint},
        resources=resources,
    )


def pretrain_step(name: str, config: PretrainConfig, data: Step, version: str, resources: Resources) -> Step:
    """Pre-trains on `data`."""
    return Step(
        kind="pretrain",
        name=name,
        version=version,
        fn=pretrain,
        config=config,
        inputs={"data": data},
        resources=resources,
        retries=2,
    )


def adopt_step(name: str, config: AdoptConfig, version: str, resources: Resources) -> Step:
    """Takes in a checkpoint from outside."""
    return Step(kind="import", name=name, version=version, fn=adopt, config=config, resources=resources)


def fan_out(
    name: str,
    finetuning: FinetuneConfig,
    evaluation: EvaluateConfig,
    jobs: Sequence[Job],
    checkpoints: Mapping[str, Step],
    data: Step,
    version: str,
    machines: Machines,
    *,
    accelerate: Callable[[BackboneConfig], BackboneConfig] = accelerated,
    whole_image_from: int | None = None,
    weights: Sequence[Weights] = ("handed on",),
) -> list[Step]:
    """One fine-tuning and its evaluations for each job; returns the evaluations.

    Args:
        finetuning, evaluation: what the jobs have in common; a job's resolution is that of its evaluation too.
        jobs: what each changes (see `_jobs.expand`).
        checkpoints: what a job's `checkpoint` may name; a job that names none takes the only one.
        accelerate: gives a backbone the fast tokens of a job that asks for them.
        whole_image_from: from this size (pixels) on evaluation takes the whole image instead of its centre.
        weights: what is evaluated: those that fine-tuning hands on (averaged, where it keeps an average), its last
            ones, or both.
    """
    evaluations, evaluation = [], pinned(evaluation)
    for job in jobs:
        config = configured(finetuning, job, accelerate)
        init = _checkpoint(job, checkpoints)
        tuned = Step(
            kind="finetune",
            name=f"{name}-{job.name}",
            version=version,
            fn=finetune,
            config=config,
            inputs={"data": data} | ({"init": init} if init else {}),
            resources=machines.finetune,
            retries=2,
            labels=labels(job),
        )
        judged = at_size(evaluation, config.backbone.img_size, whole_image_from)
        for kind in weights:
            ending, checkpoint = "", tuned
            if kind == "last" and config.ema_decay > 0:
                ending, checkpoint = "-last", replace(
                    tuned, kind="last", fn=last_weights, config=LastConfig(), inputs={"checkpoint": tuned},
                    resources=Resources(),
                )  # fmt: skip
            evaluations.append(
                Step(
                    kind="evaluate",
                    name=f"{name}-{job.name}{ending}",
                    version=version,
                    fn=evaluate,
                    config=judged,
                    inputs={"data": data, "checkpoint": checkpoint},
                    resources=machines.evaluate,
                    labels=labels(job) | ({"weights": _weights(kind, config)} if len(weights) > 1 else {}),
                )
            )
    return list({step.id: step for step in evaluations}.values())


def _checkpoint(job: Job, checkpoints: Mapping[str, Step]) -> Step | None:
    if job.checkpoint == SCRATCH:
        return None
    if job.checkpoint is None and len(checkpoints) == 1:
        return next(iter(checkpoints.values()))
    if job.checkpoint is None or job.checkpoint not in checkpoints:
        raise ConfigError(
            f"job '{job.name}' starts from a checkpoint that the recipe does not have",
            expected=", ".join([*checkpoints, SCRATCH]),
            found=job.checkpoint or "none",
            remedy="correct the job's 'checkpoint', or the grid's",
        )
    return checkpoints[job.checkpoint]


def _weights(kind: Weights, config: FinetuneConfig) -> str:
    return "ema" if kind == "handed on" and config.ema_decay > 0 else "last"


def at_size(evaluation: EvaluateConfig, size: int, whole_image_from: int | None) -> EvaluateConfig:
    """The evaluation of images of `size` pixels."""
    view = evaluation.data.view.model_copy(update={"size": size})
    if whole_image_from is not None and size >= whole_image_from:
        view = view.model_copy(update={"crop_pct": 1.0})
    return evaluation.model_copy(update={"data": evaluation.data.model_copy(update={"view": view})})
