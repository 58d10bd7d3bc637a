"""Evaluate a classifier checkpoint on a split; returns an EvaluationRef with what each evaluator yielded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.distributed import World
from cluster.errors import ConfigError
from stages.artifacts import Artifact, CheckpointRef, DatasetRef, EvaluationRef, Measurement, Outcome
from stages.context import Progress, StageContext
from stages.evaluate.config import EvaluateConfig
from stages.train.launch import as_rank, spec_of


def run(config: EvaluateConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Measure the checkpoint.

    Raises:
        ConfigError: an input is missing or of another kind, or sizes do not fit.
        DataInvalid: weights or data are broken.
    """
    data, checkpoint = inputs.get("data"), inputs.get("checkpoint")
    if not isinstance(data, DatasetRef):
        raise ConfigError("evaluate needs the input 'data'", expected="a data set", found=data and data.kind)
    if not isinstance(checkpoint, CheckpointRef) or checkpoint.task != "classify":
        raise ConfigError(
            "evaluate needs the input 'checkpoint'",
            expected="a classifier",
            found=f"a checkpoint of task {checkpoint.task}"
            if isinstance(checkpoint, CheckpointRef)
            else checkpoint,
            remedy="fine-tune it first",
        )
    spec = spec_of(
        context,
        config=config.model_dump(mode="json"),
        data=data.model_dump(),
        checkpoint=checkpoint.model_dump(),
    )
    result = context.executor.workers(evaluate_rank, spec, context.resources)
    measurements = [Measurement(metric=name, value=value) for name, value in result["measurements"]]
    return Outcome(
        artifact=EvaluationRef(
            dataset=data.name,
            split=config.split,
            samples=result["samples"],
            evaluator=config.identity(),
            checkpoint=checkpoint,
            measurements=measurements,
        ),
        files=[],
        metrics={m.metric: m.value for m in measurements},
    )


def evaluate_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """The work of one rank; `spec` is what `run` made."""
    config = EvaluateConfig.parse(spec["config"])
    return as_rank(spec, lambda world: _evaluate(config, spec, world), timeout_s=config.timeout_s)


def _evaluate(config: EvaluateConfig, spec: dict[str, Any], world: World) -> dict[str, Any]:
    import torch

    from stages.data.dataset import ShardDataset
    from stages.data.feed import EvalFeed
    from stages.evaluate.classification import classification
    from stages.model import load

    dataset = ShardDataset.open(spec["data"]["manifest"], config.split, config.data.cache)
    model = load(spec["checkpoint"]["uri"], sha256=spec["checkpoint"]["sha256"])
    classes = getattr(model, "num_classes", None)
    if classes != dataset.num_classes:
        raise ConfigError(
            "the classifier and the data set have different classes",
            expected=f"{dataset.num_classes} classes",
            found=classes,
            remedy="evaluate on the data set that it was fine-tuned on",
        )
    model.to(world.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    progress = Progress(spec["out"], total=len(dataset), unit="images") if world.rank == 0 else None
    feed = EvalFeed(
        dataset,
        config.data.view,
        rank=world.rank,
        world_size=world.world_size,
        batch_size=config.data.batch_size,
        loader_workers=config.data.loader_workers,
    )
    with feed:
        watched = _watched(feed, progress, world.world_size) if progress else feed
        found = list(classification(model, watched, config, device=world.device, samples=len(dataset)))
    if progress:
        progress.update(len(dataset), state="done", force=True, **dict(found))
    return {"measurements": found, "samples": len(dataset)}


def _watched(feed: Any, progress: Progress, world_size: int) -> Any:
    done = 0
    for batch in feed:
        yield batch
        done += len(batch.labels)
        progress.update(done * world_size)
