"""Evaluate a checkpoint on a split with a list of evaluators; returns an EvaluationRef with what they yielded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster import distributed, storage
from cluster.distributed import World
from cluster.errors import ConfigError
from stages.artifacts import (
    Artifact,
    CheckpointRef,
    DatasetRef,
    EvaluationRef,
    FileInfo,
    Measurement,
    Outcome,
)
from stages.context import StageContext
from stages.evaluate.config import Classification, EvaluateConfig, Knn, Linear, Real, Speed
from stages.evaluate.found import Found
from stages.train.launch import as_rank, spec_of

if TYPE_CHECKING:
    from stages.evaluate.classification import ClassificationMeter
    from stages.evaluate.real import RealMeter
    from stages.evaluate.setting import Setting
    from stages.evaluate.workbench import Workbench

    Taker = tuple[Setting, list[tuple[Classification | Real, ClassificationMeter | RealMeter]]]


def run(config: EvaluateConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Measure the checkpoint: a classifier, or, with evaluators that need no head, a pre-trained backbone.

    Raises:
        ConfigError: an input is missing or of another kind, or sizes or classes do not fit.
        DataInvalid: weights, data or label files are broken.
    """
    data, checkpoint = inputs.get("data"), inputs.get("checkpoint")
    if not isinstance(data, DatasetRef):
        raise ConfigError("evaluate needs the input 'data'", expected="a data set", found=data and data.kind)
    if not isinstance(checkpoint, CheckpointRef):
        raise ConfigError(
            "evaluate needs the input 'checkpoint'",
            expected="a checkpoint",
            found=checkpoint and checkpoint.kind,
        )
    spec = spec_of(
        context,
        timeout_s=config.timeout_s,
        config=config.model_dump(mode="json"),
        data=data.model_dump(),
        checkpoint=checkpoint.model_dump(),
    )
    result = context.executor.workers(evaluate_rank, spec, context.resources)
    found = [Found(**item) for item in result["found"]]
    measurements = [
        Measurement(
            metric=metric,
            value=value,
            evaluator=item.evaluator,
            samples=item.samples,
            variant=item.variant,
            on_data=item.on_data,
        )
        for item in found
        for metric, value in item.values
        if math.isfinite(value)
    ]
    headline: dict[str, float] = {}
    for measured in measurements:
        headline.setdefault(measured.metric, measured.value)
    return Outcome(
        artifact=EvaluationRef(
            dataset=data.name,
            split=config.split,
            samples=data.splits[config.split],
            data_fingerprint=data.fingerprint,
            evaluator=config.identity(),
            checkpoint=checkpoint,
            model_fingerprint=result["model_fingerprint"],
            measurements=measurements,
        ),
        files=[FileInfo(**info) for info in result["files"]],
        metrics=headline,
        notes=[note for item in found for note in [*item.notes, *_lost(item)]],
    )


def _lost(item: Found) -> Iterator[str]:
    """Figures that are no numbers are left out of the registry, which would take them for values; they are told."""
    for metric, value in item.values:
        if not math.isfinite(value):
            yield (
                f"{metric} {item.variant}".rstrip()
                + f" is {value}: it is not recorded (are the weights broken?)"
            )


def evaluate_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """The work of one rank; `spec` is what `run` made."""
    config = EvaluateConfig.parse(spec["config"])
    return as_rank(spec, lambda world: _evaluate(config, spec, world))


def _evaluate(config: EvaluateConfig, spec: dict[str, Any], world: World) -> dict[str, Any]:
    from stages.evaluate.setting import Weights
    from stages.evaluate.speed import sweep
    from stages.evaluate.workbench import Workbench

    weights = Weights.open(spec["checkpoint"]["uri"], spec["checkpoint"]["sha256"])
    bench = Workbench(config, weights, spec["data"], world=world, out=spec["out"])
    takers = _takers(bench)  # refuses classes and label files that do not fit, before any work
    speeds = [
        item
        for evaluator in config.evaluators
        if isinstance(evaluator, Speed)
        for item in sweep(bench, evaluator)
    ]  # first, while nothing else lies in the device's memory
    every = [*_of_predictions(bench, takers), *_of_features(bench), *speeds]
    # A setting may be asked for twice: `off` is what a model without acceleration has as its own.
    once: dict[bytes, Found] = {}
    for item in every:
        once.setdefault(storage.canonical_json(item.evaluator), item)
    found = list(once.values())
    files = distributed.on_rank_zero(lambda: _write_tables(found, spec))
    bench.finish(
        **{metric: value for item in found[:1] for metric, value in item.values if math.isfinite(value)}
    )
    return {
        "found": [asdict(item) | {"table": None} for item in found],
        "files": files,
        "model_fingerprint": weights.fingerprint,
    }


def _takers(bench: Workbench) -> list[Taker]:
    """Evaluators of logits with their meters, those of one setting together."""
    from stages.evaluate.workbench import passes_of_logits

    return [
        (setting, [(evaluator, _meter(bench, evaluator)) for evaluator in evaluators])
        for setting, evaluators in passes_of_logits(bench)
    ]


def _of_predictions(bench: Workbench, takers: list[Taker]) -> Iterator[Found]:
    """One pass over the split for each setting."""
    from stages.evaluate.workbench import own_facts

    for setting, meters in takers:
        for batch, logits_BK in bench.logits(setting):
            for _, meter in meters:
                meter.update(batch, logits_BK)
        for evaluator, meter in meters:
            values = list(meter.finish())
            yield Found(
                values=values,
                samples=meter.covered,
                evaluator=own_facts(evaluator) | meter.facts | bench.class_facts() | setting.facts,
                variant=" ".join(filter(None, [meter.variant, setting.variant])),
                table=meter.table(),
                notes=meter.notes,
            )


def _meter(bench: Workbench, evaluator: Classification | Real) -> ClassificationMeter | RealMeter:
    from stages.evaluate.classification import ClassificationMeter
    from stages.evaluate.label_space import match
    from stages.evaluate.real import RealMeter, read_labels
    from stages.evaluate.setting import refuse_without_head

    rows, dataset, names = bench.weights.num_classes, bench.split(bench.config.split), bench.class_names()
    refuse_without_head(evaluator.kind, rows)
    space, samples = match(bench.data_name, dataset.classes, names, rows), len(dataset)
    if isinstance(evaluator, Real):
        labels, digest = read_labels(evaluator.labels, evaluator.sha256, len(dataset.classes))
        return RealMeter(
            labels, digest, dataset.key, space, dataset.classes, device=bench.device, samples=samples
        )
    return ClassificationMeter(evaluator, space, dataset.classes, device=bench.device, samples=samples)


def _of_features(bench: Workbench) -> Iterator[Found]:
    """Evaluators of frozen features; those of one setting share the features."""
    from stages.evaluate.knn import knn
    from stages.evaluate.linear import LinearProbe
    from stages.evaluate.workbench import own_facts

    for evaluator in bench.config.evaluators:
        if not isinstance(evaluator, Knn | Linear):
            continue
        setting = bench.setting(evaluator)
        train = bench.features(setting, evaluator.train_split)
        query = bench.features(setting, bench.config.split)
        classes = bench.split(bench.config.split).num_classes
        notes = []
        if isinstance(evaluator, Knn):
            values = list(knn(evaluator, train, query, classes))
        else:
            probe = LinearProbe(evaluator, train, classes)
            values, notes = list(probe.values(query)), probe.notes()
        yield Found(
            values=values,
            samples=query.total,
            evaluator=own_facts(evaluator) | setting.facts,
            variant=setting.variant,
            notes=notes,
        )


def _write_tables(found: list[Found], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """A JSON file for every evaluator that has a table: `classification.json`, `classification-both-384px.json`.

    Of several that would have one name, the later ones are numbered.
    """
    files: list[dict[str, Any]] = []
    names: list[str] = []
    for item in found:
        if item.table is None:
            continue
        name = "-".join([item.evaluator["kind"], *item.variant.split()])
        names.append(name)
        number = f"-{names.count(name)}" if names.count(name) > 1 else ""
        uri = storage.join(spec["files"], f"{name}{number}.json")
        content = {"evaluator": item.evaluator, **item.table}
        sha256 = storage.write_json_exclusive(uri, content)
        size = len(storage.canonical_json(content))
        path = uri.removeprefix(storage.join(spec["out"]) + "/")
        files.append(FileInfo(path=path, bytes=size, sha256=sha256).model_dump())
    return files
