"""Recipes evaluate on ImageNet-ReaL, -V2, -A, -R, -Sketch where the user has them, and trace accuracy over speed."""

from __future__ import annotations

import pytest

from pipeline import preflight, recipes
from pipeline.step import Step, topological

SETS = ("v2", "a", "r", "sketch")


def built(recipe: str, **values: str) -> dict[str, Step]:
    module = recipes.load(recipe)
    steps = module.build(
        module.Recipe().with_set({name.replace("__", "."): value for name, value in values.items()})
    )
    return {step.id: step for step in topological(steps)}


def test_every_classifier_is_evaluated_on_every_set_that_is_given() -> None:
    given = {f"also__imagenet_{name}": f"/data/{name}" for name in (*SETS, "real")}
    plain, more = built("pretrain_base"), built("pretrain_base", **given)
    judged = [id_ for id_ in plain if id_.startswith("evaluate/base-") and "features" not in id_]
    assert judged and plain.items() <= more.items(), "what was finished without the sets stays as it is"
    added = set(more) - set(plain)
    assert added == {f"shard/imagenet-{name}/v1" for name in SETS} | {
        id_.replace("evaluate/", f"evaluate/imagenet-{name}-") for name in (*SETS, "real") for id_ in judged
    }
    for id_ in judged:
        on_a, real = (more[id_.replace("evaluate/", f"evaluate/imagenet-{name}-")] for name in ("a", "real"))
        assert on_a.inputs["data"].id == "shard/imagenet-a/v1" and on_a.inputs["data"].config.splits == (
            "val",
        )
        assert (
            on_a.inputs["checkpoint"].id == real.inputs["checkpoint"].id == plain[id_].inputs["checkpoint"].id
        )
        assert real.inputs["data"].id == "shard/imagenet-1k/v1"
        assert on_a.config.data == real.config.data == plain[id_].config.data
        assert [e.kind for e in real.config.evaluators] == ["real"] and real.config.evaluators[
            0
        ].labels == "/data/real"


def test_recipes_trace_the_curve_and_probe_the_features() -> None:
    steps = built("pretrain_large")
    curve = next(s for s in steps.values() if s.id.startswith("evaluate/large-640px")).config.evaluators
    accuracy = {e.acceleration.setting for e in curve if e.kind == "classification"}
    speed = {each.setting for e in curve if e.kind == "speed" for each in e.settings}
    assert speed == {"off", "migration", "gathering", "both"} and accuracy == speed | {"own"}
    probe = steps["evaluate/large-features/v1"]
    assert probe.inputs["checkpoint"].id == "pretrain/large/v1" and probe.config.data.view.size == 256
    assert {e.kind for e in probe.config.evaluators} == {"knn", "linear"}


@pytest.mark.parametrize("name", ["real", "v2", "a", "r", "sketch"])
def test_set_that_is_not_there_is_told_with_its_origin(tmp_path, name: str) -> None:
    module = recipes.load("pretrain_base")
    config = module.Recipe().with_set({f"also.imagenet_{name}": str(tmp_path / "absent")})
    [found] = [
        f for f in preflight.examine(module.requirements(config, None)) if f.name == f"imagenet-{name}"
    ]
    assert not found.ok and "absent" in found.text and "https://github.com/" in found.remedy
