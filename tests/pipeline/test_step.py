"""Identity of steps and selection from a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import ConfigError
from cluster.resources import Resources
from pipeline.step import select, topological
from tests.pipeline import toys


def test_fingerprint_ignores_where_and_how_fast() -> None:
    step = toys.chain()[0].inputs["checkpoint"]
    moved = replace(
        step,
        resources=Resources(workers=64, gpus=1),
        retries=9,
        config=toys.ToyConfig(value=3.0, init="pretrained", workers=8),
    )
    assert moved.fingerprint == step.fingerprint


def test_fingerprint_follows_config_and_inputs() -> None:
    before, after = toys.chain(value=3.0)[0], toys.chain(value=4.0)[0]
    assert before.inputs["checkpoint"].fingerprint != after.inputs["checkpoint"].fingerprint
    assert before.fingerprint != after.fingerprint, "a changed input changes everything that follows"


def test_topological_order_puts_inputs_first() -> None:
    ids = [step.id for step in topological(toys.chain())]
    assert ids == ["finetune/a/v1", "evaluate/a/v1", "finetune/b/v1", "evaluate/b/v1"]


def test_two_different_steps_with_one_output_are_refused() -> None:
    with pytest.raises(ConfigError, match="share the output 'evaluate/a/v1'"):
        topological([toys.chain(value=1.0)[0], toys.chain(value=2.0)[0]])


@pytest.mark.parametrize("pattern", ["evaluate/a/v1", "evaluate/a"])
def test_only_takes_a_step_with_its_inputs(pattern: str) -> None:
    assert [s.id for s in select(topological(toys.chain()), [pattern])] == ["finetune/a/v1", "evaluate/a/v1"]


def test_only_takes_a_kind_or_a_name() -> None:
    steps = topological(toys.chain())
    assert [s.id for s in select(steps, ["finetune"])] == ["finetune/a/v1", "finetune/b/v1"]
    assert [s.id for s in select(steps, ["b"])] == ["finetune/b/v1", "evaluate/b/v1"]


def test_only_names_the_nearest_step() -> None:
    with pytest.raises(ConfigError, match="did you mean 'finetune/a/v1'"):
        select(topological(toys.chain()), ["fintune/a/v1"])
