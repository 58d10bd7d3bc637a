"""Given checkpoints, evaluated on a data set: classifiers, and the features of pre-trained backbones.

    make evaluate CHECKPOINT=production ROOT=s3://bucket/itpn
    itpn evaluate /weights/fast_itpn_base_224.pth --root runs/eval --data s3://bucket/ILSVRC2012.tar

Hardware: one GPU, or with `--set gpus_per_worker=0` none. A checkpoint that the root's registry knows is evaluated
on the data that it was trained on, where no other are given.
"""

from __future__ import annotations

from pydantic import Field

from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes._chain import evaluate_step
from pipeline.recipes._downstream import FromCheckpoints, data_step, from_checkpoints_requirements, starts
from pipeline.recipes._other_sets import also_on
from pipeline.step import Step
from stages.adopt.config import AdoptConfig


class Recipe(FromCheckpoints):
    """The evaluation's values."""

    checkpoints: dict[str, AdoptConfig] = Field(default={"given": AdoptConfig()}, min_length=1)


def build(config: Recipe) -> list[Step]:
    """shard, import → evaluate."""
    data = data_step(config)
    size = config.evaluate.data.view.size
    judged = [
        evaluate_step(f"{name}-{size}px", config.evaluate, data, start, config.version, config.evaluation)
        for name, start in starts(config).items()
    ]
    return also_on(judged, config.also, config.version, Resources(workers=config.shard_workers))


def requirements(config: Recipe, address: str | None) -> list[preflight.Requirement]:
    """A GPU, the data set, the checkpoints."""
    return from_checkpoints_requirements(config, address)
