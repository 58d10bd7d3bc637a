"""ImageNet-ReaL, -V2, -A, -R and -Sketch, from where the user has them: further evaluations of every classifier.

    --set also.imagenet_real=/data/real.json --set also.imagenet_a=/data/imagenet-a.tar --set also.imagenet_v2=…

Each is a step of its own, so adding one later leaves what is finished as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.resources import Resources
from pipeline import preflight
from pipeline.recipes._chain import shard_step
from pipeline.step import Step
from stages.config import Config
from stages.evaluate.config import Classification, EvaluateConfig, Real
from stages.shard.config import ShardConfig

ORIGINS = {
    "imagenet_real": "real.json of https://github.com/google-research/reassessed-imagenet",
    "imagenet_v2": "a tar (gunzip it) or folder of https://github.com/modestyachts/ImageNetV2, class folders 0 … 999",
    "imagenet_a": "imagenet-a.tar of https://github.com/hendrycks/natural-adv-examples, or the folder it unpacks to",
    "imagenet_r": "imagenet-r.tar of https://github.com/hendrycks/imagenet-r, or the folder it unpacks to",
    "imagenet_sketch": "the zip of https://github.com/HaohanWang/ImageNet-Sketch, or the folder it unpacks to",
}


class OtherSets(Config):
    """URI of each; empty leaves it out. A classifier needs ImageNet-1K's classes."""

    imagenet_real: str = ""
    imagenet_v2: str = ""
    imagenet_a: str = ""
    imagenet_r: str = ""
    imagenet_sketch: str = ""

    def given(self) -> dict[str, str]:
        """Those that there are, by name."""
        return {name: uri for name, uri in self if uri}


def also_on(evaluations: Sequence[Step], also: OtherSets, version: str, resources: Resources) -> list[Step]:
    """The evaluations, and each of them again on the other sets.

    Args:
        resources: of the sharding of a set.
    """
    steps = list(evaluations)
    for name, uri in also.given().items():
        title = name.replace("_", "-")
        for step in evaluations:
            assert isinstance(step.config, EvaluateConfig)
            inputs, evaluator = (
                dict(step.inputs),
                Real(labels=uri) if name == "imagenet_real" else Classification(),
            )
            if name != "imagenet_real":
                images = ShardConfig(name=title, source=uri, splits=("val",), shard_bytes=64 * 2**20)
                inputs["data"] = shard_step(images, version, resources)
            config = step.config.model_copy(update={"evaluators": (evaluator,), "split": "val"})
            steps.append(replace(step, name=f"{title}-{step.name}", config=config, inputs=inputs))
    return steps


def other_requirements(also: OtherSets) -> list[preflight.Requirement]:
    """Every set that was named is there."""
    return [
        preflight.readable(
            name.replace("_", "-"),
            uri,
            f"--set also.{name}=URI of {ORIGINS[name]}",
            "evaluate" if name == "imagenet_real" else "shard",
        )
        for name, uri in also.given().items()
    ]
