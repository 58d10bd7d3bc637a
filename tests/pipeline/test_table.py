"""`itpn results table` and the recipe that it was made for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from pipeline import recipes
from pipeline.cli import app
from pipeline.recipes import demo
from pipeline.runner import Runner
from pipeline.step import Step, topological
from stages.config import Config
from tests.pipeline import toys

VALUES = {("a", "ema"): (1.0, 3.0), ("a", "last"): (2.0, 2.0), ("b", "ema"): (5.0, 6.0)}


class Recipe(Config):
    pass


def build(config: Config) -> list[Step]:
    """Two checkpoints, two kinds of weights (one is missing), two seeds; toys whose value is their result."""
    template, steps = toys.chain()[0], []
    for (checkpoint, weights), values in VALUES.items():
        for seed, value in enumerate(values):
            name = f"{checkpoint}-{weights}-s{seed}"
            trained = replace(
                template.inputs["checkpoint"], name=name, config=toys.ToyConfig(value=value, seed=seed)
            )
            labels = {"checkpoint": checkpoint, "weights": weights, "seed": f"s{seed}"}
            steps.append(replace(template, name=name, inputs={"checkpoint": trained}, labels=labels))
    return steps


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    module = SimpleNamespace(Recipe=Recipe, build=build)
    monkeypatch.setattr(recipes, "load", lambda name: module)
    monkeypatch.setitem(sys.modules, "pipeline.recipes.toy_table", module)
    Runner(str(tmp_path), "toy", build(Recipe()), open_session=toys.ThreadSession).run()
    return str(tmp_path)


def table(root: str, *arguments: str):
    return CliRunner().invoke(app, ["results", "table", "toy_table", "--root", root, *arguments])


def test_groups_have_mean_and_spread_over_seeds(root: str) -> None:
    rows = json.loads(table(root, "--json").stdout.splitlines()[-1])["rows"]
    found = {(r["checkpoint"], r["weights"]): (r["n"], r["mean"], r["std"]) for r in rows}
    assert found[("a", "ema")] == (2, 2.0, pytest.approx(2**0.5))
    assert found[("a", "last")] == (2, 2.0, 0.0) and found[("b", "ema")][1] == 5.5


def test_an_axis_may_be_the_columns_and_gaps_are_shown(root: str) -> None:
    lines = table(root, "--across", "checkpoint", "--markdown").stdout.splitlines()
    assert lines[0] == "| weights | a | b |"
    assert lines[2] == "| ema | 2.00 ± 1.41 (2) | 5.50 ± 0.71 (2) |"
    assert lines[3] == "| last | 2.00 ± 0.00 (2) | – |"
    assert "2.00 ± 1.41 (2)" in table(root).stdout


def test_what_is_not_there_is_told(root: str, tmp_path: Path) -> None:
    wrong = table(root, "--across", "wieghts")
    assert wrong.exit_code == 2 and "did you mean 'weights'" in wrong.stderr
    empty = table(str(tmp_path / "empty"))
    assert empty.exit_code == 2 and "0 of 6 evaluations done" in empty.stderr


def test_demo_table_reuses_the_demo_and_judges_both_weights_of_one_training() -> None:
    module = recipes.load("demo_table")
    steps = {step.id: step for step in topological(module.build(module.Recipe()))}
    of_demo = {step.id: step for step in topological(demo.build(demo.Recipe()))}
    shared = steps.keys() & of_demo.keys()
    assert shared == {"shard/clipart-12/v1", "pretrain/demo/v1"}
    assert all(steps[i].fingerprint == of_demo[i].fingerprint for i in shared)
    tuned = [s for i, s in steps.items() if i.startswith("finetune")]
    judged = [s for i, s in steps.items() if i.startswith("evaluate")]
    assert (len(tuned), len(judged)) == (24, 48)
    assert {s.labels["weights"] for s in judged} == {"ema", "last"}
    fast = [s.config.backbone for s in tuned if s.labels["tokens"] == "fast"]
    assert {(b.img_size, b.gathering.window, b.migration.keep) for b in fast} == {(96, 3, 0.5), (128, 4, 0.5)}
    assert all(s.config.backbone.migration is None for s in tuned if s.labels["tokens"] == "dense")
    assert {s.config.data.view.size for s in judged if s.labels["resolution"] == "128px"} == {128}
