"""Recipes evaluate on ImageNet-ReaL, -V2, -A, -R, -Sketch where the user has them, and trace accuracy over speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import DriftError
from pipeline import preflight, recipes
from pipeline import record as records
from pipeline.cli import app
from pipeline.step import Step, topological
from tests.pipeline.toys import finished

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


def test_corrected_labels_are_another_evaluation_and_their_path_is_none(tmp_path: Path) -> None:
    """Of real.json as a further set, and as an evaluator of the recipe's own; and of class names."""
    file, other = tmp_path / "real.json", tmp_path / "elsewhere.json"

    def prints(path: Path) -> list[str]:
        real = json.dumps([{"kind": "real", "labels": str(path)}])
        values = {
            "also__imagenet_real": str(path),
            "evaluate__evaluators": real,
            "evaluate__classes": str(path),
        }
        steps = built("pretrain_base", **values)
        return [step.fingerprint for id_, step in sorted(steps.items()) if id_.startswith("evaluate/")]

    file.write_text("[[1]]")
    before = prints(file)
    file.rename(other)
    assert prints(other) == before
    other.write_text("[[2]]")
    after = prints(other)
    assert sum(x != y for x, y in zip(before, after, strict=True)) == len(before) - 1, "all but the probe's"


def test_each_file_decides_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for values in (
        {"also__imagenet_real": str(file)},
        {"evaluate__classes": str(file)},
        {"evaluate__evaluators": json.dumps([{"kind": "real", "labels": str(file)}])},
    ):
        found = []
        for content in ("[[1]]", "[[2]]"):
            file.write_text(content)
            steps = built("evaluate", **values)
            found.append({step.fingerprint for id_, step in steps.items() if id_.startswith("evaluate/")})
        assert found[0] != found[1], values


def test_hash_that_was_given_stays(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[1]]")
    real = {"kind": "real", "labels": str(tmp_path / "real.json"), "sha256": "0" * 64}
    [step] = [
        s for s in built("evaluate", evaluate__evaluators=json.dumps([real])).values() if s.kind == "evaluate"
    ]
    assert step.config.evaluators[0].sha256 == "0" * 64


def test_label_files_that_are_not_there_are_told_before_anything_runs(tmp_path: Path) -> None:
    module, absent = recipes.load("downstream_base"), str(tmp_path / "absent")
    config = module.Recipe().with_set(
        {
            "evaluate.evaluators": json.dumps([{"kind": "real", "labels": absent}]),
            "evaluate.classes": absent,
        }
    )
    found = {f.name: f for f in preflight.examine(module.requirements(config, None))}
    assert not found["labels of ImageNet-ReaL"].ok and not found["class names"].ok
    assert "--set evaluate.classes=FILE" in found["class names"].remedy
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "file").touch()
    again = {f.name: f for f in preflight.examine(module.requirements(config, None))}
    assert "a folder" in str(again["labels of ImageNet-ReaL"]) and not again["class names"].ok


def test_a_finished_evaluation_stays_done_without_its_files(tmp_path: Path) -> None:
    """Of labels and class names that are away nothing is asked; files that are there and differ are drift."""
    root, names, labels = str(tmp_path / "root"), tmp_path / "names.txt", tmp_path / "real.json"

    def flags() -> list[str]:
        real = json.dumps([{"kind": "real", "labels": str(labels)}])
        values = [f"evaluate.classes={names}", f"evaluate.evaluators={real}", f"also.imagenet_real={labels}"]
        return ["evaluate", "--root", root, "--json", *(part for v in values for part in ("--set", v))]

    def told(command: str) -> dict:
        done = CliRunner().invoke(app, [command, *flags()])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

    names.write_text("n01\n")
    labels.write_text("[[0]]")
    values = {"evaluate__classes": str(names), "also__imagenet_real": str(labels)}
    values["evaluate__evaluators"] = json.dumps([{"kind": "real", "labels": str(labels)}])
    for step in built("evaluate", **values).values():
        records.commit(root, step, finished(step))
    for away in ([names], [labels], [names, labels]):
        held = [(file, file.read_text()) for file in away]
        for file in away:
            file.unlink()
        assert {step["state"] for step in told("status")["steps"]} == {"done"}
        assert all(step["reused"] for step in told("run")["steps"])
        for file, text in held:
            file.write_text(text)
    labels.write_text("[[1]]")
    names.unlink()
    steps = told("status")["steps"]
    assert {step["step"].split("/")[0] for step in steps if step["state"] == "drifted"} == {"evaluate"}
    assert "classes_sha256" not in str(steps), "a file that is away is no difference"
    run = CliRunner().invoke(app, ["run", *flags()])
    assert run.exit_code == 2 and "made from another config" in run.output, "GPUs would not help"


@pytest.mark.parametrize("recipe", ["demo", "demo_table", "evaluate", "downstream_base", "pretrain_base"])
def test_a_new_version_leaves_the_sharded_data_as_they_are(recipe: str) -> None:
    also = {} if recipe.startswith("demo") else {"also__imagenet_a": "/data/a"}
    plain, anew = built(recipe, **also), built(recipe, version="v2", **also)
    sharded = {id_ for id_ in plain if id_.startswith("shard/")}
    assert sharded and {id_ for id_ in anew if id_.startswith("shard/")} == sharded
    assert set(plain) & set(anew) == sharded
    assert {id_.removesuffix("/v1") for id_ in plain} == {id_[: id_.rindex("/")] for id_ in anew}
    other = built(recipe, data_version="v2", **also)
    assert {id_ for id_ in other if id_.startswith("shard/")} == {id_[:-1] + "2" for id_ in sharded}


def test_drift_of_data_names_the_version_of_data(tmp_path: Path) -> None:
    steps = built("demo").values()
    for step in steps:
        records.commit(str(tmp_path), step, finished(step))
    for step in built("demo", data__seed="1", pretrain__global_batch="32").values():
        if step.kind == "evaluate":
            with pytest.raises(DriftError, match=f"itpn evaluate {step.inputs['checkpoint'].id}"):
                records.load(str(tmp_path), step)
        if step.kind in ("shard", "pretrain"):
            with pytest.raises(DriftError) as told:
                records.load(str(tmp_path), step)
            setting = "data_version" if step.kind == "shard" else "version"
            assert f"--set {setting}=" in str(told.value.remedy)
