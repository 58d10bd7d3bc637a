"""Given checkpoints, measured on a data set: classifiers, and the features of pre-trained backbones.

    make evaluate CHECKPOINT=production ROOT=s3://bucket/itpn
    itpn evaluate /weights/fast_itpn_base_224.pth --root runs/eval --data s3://bucket/ILSVRC2012.tar

Hardware: one GPU, or with `--set gpus_per_worker=0` none. A checkpoint that the root's registry knows is evaluated
on the data that it was trained on, where no other are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from cluster import storage
from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes._chain import at_size, evaluate_step
from pipeline.recipes._downstream import FromCheckpoints, data_step, from_checkpoints_requirements, starts
from pipeline.recipes._imagenet import WHOLE_IMAGE_FROM
from pipeline.recipes._other_sets import also_on, refuse_heads_that_do_not_fit
from pipeline.step import Step
from stages.adopt.config import AdoptConfig
from stages.evaluate.config import Classification, EvaluateConfig, Evaluator, Knn, Linear, Speed

# Whatever needs no further data. Of a backbone without a head, all but the first.
EVERY: tuple[Evaluator, ...] = (Classification(), Knn(), Linear(), Speed())


class Recipe(FromCheckpoints):
    """The evaluation's values."""

    checkpoints: dict[str, AdoptConfig] = Field(default={"given": AdoptConfig()}, min_length=1)
    evaluate: EvaluateConfig = EvaluateConfig(evaluators=EVERY)


def measurements(*, classifier: bool, splits: Sequence[str]) -> tuple[Evaluator, ...]:
    """What is measured where nobody says otherwise, of data with these splits.

    k-NN and the linear probe learn from training images, which a set of validation alone has not.
    """
    return tuple(
        each
        for each in EVERY
        if (classifier or not isinstance(each, Classification))
        and (not isinstance(each, Knn | Linear) or each.train_split in splits)
    )


def build(config: Recipe) -> list[Step]:
    """shard, import → evaluate.

    A step's name says whatever may differ between two evaluations of a checkpoint, so that both may be in a root.
    """
    data = data_step(config)
    size = config.evaluate.data.view.size
    plain = [
        evaluate_step(
            f"{name}-{size}px{_how(config)}", config.evaluate, data, start, config.version, config.evaluation
        )
        for name, start in starts(config).items()
    ]
    place = config.data.name + (f"-{data.version}" if data.version != "v1" else "")
    what = _what(config.evaluate.evaluators)
    judged = [replace(step, name=f"{place}-{step.name}{what}") for step in plain]
    further = also_on(plain, config.also, config.data_version, Resources(workers=config.shard_workers))
    return [*judged, *further[len(plain) :]]


def requirements(config: Recipe, address: str | None) -> list[preflight.Requirement]:
    """A GPU, the data set, the checkpoints, and heads that fit the further sets."""
    heads = [_head(config, name) for name in config.checkpoints if config.also.given()]
    return [*from_checkpoints_requirements(config, address), *heads]


def _head(config: Recipe, name: str) -> preflight.Requirement:
    """Found out before a data set is sharded for an evaluation that cannot be."""

    def check() -> str:
        from stages.adopt.outside import examine, weights_file  # torch, which a plan does without

        source = config.checkpoints[name]
        weights = weights_file(source.uri) if source.uri else None
        if weights is None:
            return "not there to be looked at"  # which is a finding of its own
        description = examine(weights, ema=source.ema).config
        named = bool(source.classes or config.evaluate.classes)
        refuse_heads_that_do_not_fit(config.also, description, named)
        return f"{description.get('num_classes', 0)} classes"

    return preflight.Requirement(f"head of {name}", check, frozenset({"evaluate"}))


def _how(config: Recipe) -> str:
    """Digits for a view, a normalisation, a precision, … other than those of the size; none for the usual ones."""
    usual = at_size(EvaluateConfig(), config.evaluate.data.view.size, WHOLE_IMAGE_FROM)
    found, expected = (
        {name: value for name, value in each.identity().items() if name != "evaluators"}
        | {"classes": bool(each.classes)}
        for each in (config.evaluate, usual)
    )
    return "" if found == expected else f"-{_digits(found)}"


def _what(evaluators: tuple[Evaluator, ...]) -> str:
    """The kinds of other evaluators than EVERY, and digits where their fields are not the usual ones."""
    if evaluators == EVERY:
        return ""
    kinds = "-".join(dict.fromkeys(each.kind for each in evaluators))
    usual = all(each in EVERY for each in evaluators) and len(set(kinds.split("-"))) == len(evaluators)
    return f"-{kinds}" + ("" if usual else f"-{_digits([each.identity() for each in evaluators])}")


def _digits(value: object) -> str:
    return storage.sha256_bytes(storage.canonical_json(value))[:8]
