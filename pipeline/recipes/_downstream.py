"""What the downstream recipes share: from a given checkpoint to fine-tunings side by side, each evaluated."""

from __future__ import annotations

import math
from dataclasses import replace

from pydantic import Field

from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes._chain import Machines, adopt_step, at_size, evaluate_step, fan_out, shard_step
from pipeline.recipes._imagenet import CURVE, IMAGENET, READ, WHOLE_IMAGE_FROM
from pipeline.recipes._jobs import Grid, Job, expand
from pipeline.recipes._label_files import label_files
from pipeline.recipes._other_sets import OtherSets, also_on, other_requirements
from pipeline.search import Search
from pipeline.step import Step
from stages.adopt.config import AdoptConfig
from stages.adopt.stage import refuse_unpinned
from stages.config import Config, not_identity
from stages.evaluate.config import EvaluateConfig, Knn, Linear
from stages.finetune.config import FinetuneConfig
from stages.shard.config import ShardConfig


class FromCheckpoints(Config):
    """What recipes that begin with given checkpoints have in common."""

    version: str = not_identity("v1")
    data: ShardConfig = IMAGENET
    data_version: str = not_identity("v1")  # of the sharded data: a new `version` leaves them as they are
    checkpoints: dict[str, AdoptConfig] = Field(min_length=1)  # by the names that outputs carry
    evaluate: EvaluateConfig = EvaluateConfig()
    also: OtherSets = OtherSets()  # further sets to evaluate on
    evaluate_workers: int = not_identity(1, ge=1)  # ranks of each evaluation; they share the images
    gpus_per_worker: float = not_identity(1.0, ge=0)  # below 1, jobs of one worker share a GPU
    cpus_per_worker: float | None = not_identity(None, gt=0)  # by default 8 beside a GPU, 1 without
    shard_workers: int = not_identity(16, ge=1)

    @property
    def worker(self) -> Resources:
        """What one rank of a job gets."""
        cpus = self.cpus_per_worker or (8.0 if self.gpus_per_worker else 1.0)
        return Resources(cpus=cpus, gpus=self.gpus_per_worker)

    @property
    def evaluation(self) -> Resources:
        """What an evaluation gets."""
        return replace(self.worker, workers=self.evaluate_workers)


class DownstreamRecipe(FromCheckpoints):
    """Fine-tuning jobs from given checkpoints, each evaluated; `probe` judges what they start from.

    Each job's evaluation has everything that needs no further data but k-NN and the linear probe. Those judge features
    and cost a pass over all training images, so they are made once for each checkpoint; of each job too with
    `--set evaluate.evaluators=…`. `--set probe=null` leaves them out.
    """

    evaluate: EvaluateConfig = EvaluateConfig(data=READ, evaluators=CURVE)
    probe: EvaluateConfig | None = EvaluateConfig(data=READ, evaluators=(Knn(), Linear()))
    finetune: FinetuneConfig
    grid: Grid  # of the jobs; without `checkpoint`, from each of the recipe's
    jobs: tuple[Job, ...] = ()  # further ones
    search: Search = not_identity(Search())  # stops hopeless jobs early: --set search.kind=asha
    finetune_workers: int = not_identity(8, ge=1)  # ranks of each job


def build_downstream(config: DownstreamRecipe) -> list[Step]:
    """shard, import → one fine-tuning for each job → evaluate."""
    machines = Machines(
        shard=Resources(workers=config.shard_workers),
        pretrain=Resources(),
        finetune=replace(config.worker, workers=config.finetune_workers),
        evaluate=config.evaluation,
    )
    grid, data, given = config.grid, data_step(config), starts(config)
    if not grid.checkpoint:
        grid = grid.model_copy(update={"checkpoint": tuple(config.checkpoints)})
    judged = fan_out(
        "downstream",
        config.finetune,
        config.evaluate,
        expand(grid, config.jobs),
        given,
        data,
        config.version,
        machines,
        whole_image_from=WHOLE_IMAGE_FROM,
    )
    probed = []
    if config.probe:
        probe = at_size(config.probe, config.finetune.backbone.img_size, WHOLE_IMAGE_FROM)
        probed = [
            evaluate_step(f"{name}-features", probe, data, start, config.version, machines.evaluate)
            for name, start in given.items()
        ]
    return [*also_on(judged, config.also, config.data_version, machines.shard), *probed]


def data_step(config: FromCheckpoints) -> Step:
    """The data set's step."""
    resources = Resources(workers=config.shard_workers)
    return shard_step(config.data, config.data_version, resources)


def starts(config: FromCheckpoints) -> dict[str, Step]:
    """The steps that take the checkpoints in, by name."""
    cpus = Resources()
    return {
        name: adopt_step(name, source, config.version, cpus) for name, source in config.checkpoints.items()
    }


def from_checkpoints_requirements(
    config: FromCheckpoints, address: str | None
) -> list[preflight.Requirement]:
    """GPUs for the largest step, the data set, every checkpoint, and the files of labels."""
    ranks, needs = {"evaluate_workers": config.evaluate_workers}, []
    if isinstance(config, DownstreamRecipe):
        ranks["finetune_workers"] = config.finetune_workers
        group = replace(config.worker, workers=config.finetune_workers)
        needs.append(preflight.shares("finetune", group, config.finetune, config.finetune.data.streams))
    # One worker cannot become fewer: what it takes of a GPU can.
    wanted = {
        name if count > 1 else "gpus_per_worker": math.ceil(count * config.gpus_per_worker)
        for name, count in ranks.items()
    }
    if config.gpus_per_worker:
        needs.append(preflight.gpus(wanted, address))
    needs.append(
        preflight.readable(
            "data set",
            config.data.source,
            "--set data.source=URI of an ImageFolder tree, tar or zip (IMAGENET=URI or DATA=URI with make)",
            "shard",
        )
    )
    needs += [_given(name, source) for name, source in config.checkpoints.items()]
    needs += label_files("evaluate", config.evaluate)
    needs += other_requirements(config.also)
    return needs


def _given(name: str, source: AdoptConfig) -> preflight.Requirement:
    """A checkpoint that is there and pinned."""
    remedy = (
        f"itpn finetune FILE, or --set checkpoints.{name}.uri=FILE --set checkpoints.{name}.sha256=… "
        "(CHECKPOINT=FILE with make)"
    )
    there = preflight.readable(f"checkpoint {name}", source.uri, remedy, "import")

    def check() -> str:
        found = there.check()
        refuse_unpinned(source, name)
        return found

    return preflight.Requirement(there.name, check, there.kinds)
