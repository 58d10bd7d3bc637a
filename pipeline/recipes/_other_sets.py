"""ImageNet-ReaL, -V2, -A, -R and -Sketch, from where the user has them: further evaluations of every classifier.

    --set also.imagenet_real=/data/real.json --set also.imagenet_a=/data/imagenet-a.tar --set also.imagenet_v2=…

Each is a step of its own, so adding one later leaves what is finished as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import ConfigError
from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes._chain import shard_step
from pipeline.recipes._label_files import pinned
from pipeline.step import Step
from stages.config import Config
from stages.evaluate.config import Classification, EvaluateConfig, Real
from stages.evaluate.label_space import ORIGINS
from stages.shard.config import ShardConfig

REAL = "imagenet-real"
SUBSETS = ("imagenet-a", "imagenet-r")  # 200 of the 1000 classes, which only names can tell


class OtherSets(Config):
    """URI of each; empty leaves it out. A classifier needs ImageNet-1K's classes."""

    imagenet_real: str = ""
    imagenet_v2: str = ""
    imagenet_a: str = ""
    imagenet_r: str = ""
    imagenet_sketch: str = ""

    def given(self) -> dict[str, str]:
        """Those that there are, by name: imagenet-real, imagenet-v2, …"""
        return {name.replace("_", "-"): uri for name, uri in self if uri}


def also_on(evaluations: Sequence[Step], also: OtherSets, version: str, resources: Resources) -> list[Step]:
    """The evaluations, and each of them again on the other sets.

    Args:
        resources: of the sharding of a set.
    """
    steps = list(evaluations)
    for name, uri in also.given().items():
        only = EvaluateConfig(evaluators=(Real(labels=uri) if name == REAL else Classification(),))
        evaluators = pinned(only).evaluators
        for step in evaluations:
            assert isinstance(step.config, EvaluateConfig)
            inputs = dict(step.inputs)
            if name != REAL:
                images = ShardConfig(name=name, source=uri, splits=("val",), shard_bytes=64 * 2**20)
                inputs["data"] = shard_step(images, version, resources)
            config = step.config.model_copy(update={"evaluators": evaluators, "split": "val"})
            steps.append(replace(step, name=f"{name}-{step.name}", config=config, inputs=inputs))
    return steps


def refuse_heads_that_do_not_fit(also: OtherSets, description: Mapping[str, Any], named: bool) -> None:
    """Raise ConfigError for a checkpoint that cannot be evaluated on the sets as it is.

    Args:
        description: what its `config.json` says, or its shapes.
        named: whether the recipe names the classes of its head.
    """
    given = also.given()
    leave = f"leave them out: {' '.join(f'--set also.{_field(name)}=' for name in given)}"
    if given and not description.get("num_classes"):
        raise ConfigError(
            f"a backbone cannot be evaluated on {', '.join(given)}",
            expected="weights with a head, of fine-tuning",
            found="weights without one, of pre-training",
            remedy=f"fine-tune it first (itpn finetune), or {leave}",
        )
    subsets = [name for name in given if name in SUBSETS]
    if subsets and not named and not description.get("classes"):
        raise ConfigError(
            f"to find the classes of {', '.join(subsets)} among those of the head, the head must name its own",
            expected="names of the classes, WordNet ids",
            found=f"a head of {description['num_classes']} classes without names",
            remedy="name them with `--classes FILE` of itpn evaluate, or --set evaluate.classes=FILE (a WordNet id "
            "first on each line, in the head's order: LOC_synset_mapping.txt)",
        )


def other_requirements(also: OtherSets) -> list[preflight.Requirement]:
    """Every set that was named is there."""
    return [
        preflight.readable(
            name,
            uri,
            f"--set also.{_field(name)}=URI of {ORIGINS[name]}",
            "evaluate" if name == REAL else "shard",
            folder=name != REAL,
        )
        for name, uri in also.given().items()
    ]


def _field(name: str) -> str:
    return name.replace("-", "_")
