"""Files with labels or class names that an evaluation reads: they decide its figures, so their hashes identify it."""

from __future__ import annotations

from cluster import storage
from cluster.errors import NotFound
from pipeline import preflight
from pipeline.record import NOT_THERE
from stages.evaluate.config import EvaluateConfig, Real
from stages.evaluate.label_space import ORIGINS


def pinned(config: EvaluateConfig) -> EvaluateConfig:
    """The evaluation with the sha256 of each file that it names, so that a corrected file is another evaluation.

    A hash that was given stays. Of a file that is not there NOT_THERE stands for it: a finished evaluation stays done
    without its file, and for one that is to do `label_files` tells of it.
    """
    evaluators = tuple(
        each.model_copy(update={"sha256": _sha256(each.labels)})
        if isinstance(each, Real) and each.sha256 is None
        else each
        for each in config.evaluators
    )
    names = config.classes_sha256
    if config.classes and names is None:
        names = _sha256(config.classes)
    return config.model_copy(update={"evaluators": evaluators, "classes_sha256": names})


def label_files(place: str, config: EvaluateConfig) -> list[preflight.Requirement]:
    """Every file that the evaluation at `place` in the recipe's config names is there."""
    needs = [
        preflight.readable(
            "labels of ImageNet-ReaL",
            each.labels,
            f"`labels` of the evaluator in {place}.evaluators: {ORIGINS['imagenet-real']}",
            "evaluate",
            folder=False,
        )
        for each in config.evaluators
        if isinstance(each, Real)
    ]
    if config.classes:
        remedy = f"--set {place}.classes=FILE, a class (WordNet id) first on each line in index order"
        needs.append(preflight.readable("class names", config.classes, remedy, "evaluate", folder=False))
    return needs


def _sha256(uri: str) -> str:
    try:
        return storage.sha256_bytes(storage.read_bytes(uri))
    except NotFound:
        return NOT_THERE
