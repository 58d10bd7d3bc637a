"""The graph that every recipe shares: shard → pretrain → fine-tune jobs side by side → evaluate each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.resources import Resources
from pipeline.step import Step
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.stage import run as evaluate
from stages.finetune.config import FinetuneConfig
from stages.finetune.stage import run as finetune
from stages.pretrain.config import PretrainConfig
from stages.pretrain.stage import run as pretrain
from stages.shard.config import ShardConfig
from stages.shard.stage import run as shard


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


def fan_out(
    name: str,
    jobs: Mapping[str, tuple[FinetuneConfig, Step | None]],
    evaluation: EvaluateConfig,
    data: Step,
    version: str,
    machines: Machines,
) -> list[Step]:
    """One evaluation per job; each fine-tunes from the given pre-training, or from scratch (None)."""
    evaluations = []
    for job, (config, init) in jobs.items():
        tuned = Step(
            kind="finetune",
            name=f"{name}-{job}",
            version=version,
            fn=finetune,
            config=config,
            inputs={"data": data} | ({"init": init} if init else {}),
            resources=machines.finetune,
            retries=2,
        )
        evaluations.append(
            Step(
                kind="evaluate",
                name=f"{name}-{job}",
                version=version,
                fn=evaluate,
                config=evaluation,
                inputs={"data": data, "checkpoint": tuned},
                resources=machines.evaluate,
            )
        )
    return evaluations
