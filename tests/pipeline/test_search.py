"""Early stopping: hopeless trials end as an outcome, a resumed search repeats nothing and judges against what was."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from cluster.tune import Asha, rungs
from pipeline.registry import Registry
from pipeline.runner import Runner, State, StepStatus, exit_code
from pipeline.search import Search
from pipeline.step import Step
from stages.context import Progress
from tests.pipeline import toys

ASHA = Search(kind="asha", first_rung=0.25, reduction=2)
TOTAL = 8


def trial(config, inputs, context):
    """A training that tells its progress; its loss is its value."""
    progress = Progress(context.out, total=TOTAL, unit="steps", interval_s=0)
    for step in range(1, TOTAL + 1):
        progress.update(step, force=True, loss=config.value)
        time.sleep(config.workers * 0.4)
    return toys.train(config, inputs, context)


def trials(*losses: float, pace: int = 1) -> list[Step]:
    template, steps = toys.chain()[0], []
    trained = toys.replace_function(template.inputs["checkpoint"], trial)
    for number, loss in enumerate(losses):
        own = replace(trained, name=f"t{number}", config=toys.ToyConfig(value=loss, workers=pace))
        steps.append(replace(template, name=f"t{number}", inputs={"checkpoint": own}))
    return steps


def run(root: Path, *losses: float, search: Search | None = ASHA) -> dict[str, StepStatus]:
    runner = Runner(
        str(root), "toy", trials(*losses), open_session=toys.ThreadSession, max_parallel=1, search=search
    )
    return {status.step.id: status for status in runner.run()}


def states(found: dict[str, StepStatus]) -> list[State]:
    return [status.state for step, status in found.items() if step.startswith("finetune")]


@pytest.fixture(autouse=True)
def fresh_calls() -> None:
    toys.CALLS.clear()
    toys.ThreadSession.opened = 0


def test_worse_trials_are_stopped_and_recorded_and_nothing_is_repeated(tmp_path: Path) -> None:
    found = run(tmp_path, 1.0, 2.0)
    assert states(found) == [State.DONE, State.STOPPED_EARLY]
    assert found["evaluate/t0/v1"].state is State.DONE and found["evaluate/t1/v1"].state is State.BLOCKED
    assert exit_code(list(found.values())) == 0, "an outcome, not a failure"
    ends = {row.step: row for row in Registry(str(tmp_path)).runs()}
    assert ends["finetune/t1/v1"].outcome == "stopped" and "loss 2" in (ends["finetune/t1/v1"].error or "")
    assert ends.keys() == {"finetune/t0/v1", "evaluate/t0/v1", "finetune/t1/v1"}
    assert not storage.exists(f"{tmp_path}/finetune/t1/v1/failure.json")

    calls, opened = list(toys.CALLS), toys.ThreadSession.opened
    again = run(tmp_path, 1.0, 2.0)
    assert (toys.CALLS, toys.ThreadSession.opened) == (calls, opened), "nothing is left to do"
    assert states(again) == [State.DONE, State.STOPPED_EARLY] and exit_code(list(again.values())) == 0

    # A further trial, in a new process's search, is judged against those that were before.
    more = run(tmp_path, 1.0, 2.0, 1.9)
    assert states(more) == [State.DONE, State.STOPPED_EARLY, State.STOPPED_EARLY]
    assert storage.read_json(f"{tmp_path}/finetune/t2/v1/rungs.json")["rungs"][0]["loss"] == 1.9


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hopeless_trial_on_a_real_ray_is_ended_before_its_end(tmp_path: Path) -> None:
    steps = trials(1.0, 2.0, pace=4)
    runner = Runner(str(tmp_path), "toy", steps, max_parallel=1, search=ASHA)
    found = {status.step.id: status for status in runner.run()}
    assert states(found) == [State.DONE, State.STOPPED_EARLY]
    progress = storage.read_json(f"{tmp_path}/finetune/t1/v1/progress.json")
    assert progress["done"] < TOTAL
    assert not storage.list_files(f"{tmp_path}/finetune/t1/v1/attempts"), (
        "its process wrote nothing after that"
    )


def test_without_a_search_every_trial_finishes(tmp_path: Path) -> None:
    assert states(run(tmp_path, 1.0, 2.0, search=Search())) == [State.DONE, State.DONE]
    assert not storage.exists(f"{tmp_path}/finetune/t1/v1/rungs.json")


def test_asha_halves_at_each_rung() -> None:
    judge = Asha(0.25, 2)
    assert judge.rungs == [0.25, 0.5]
    first = [judge.hopeless(f"t{n}", 0.25, value) for n, value in enumerate([1.0, 4.0, 2.0, 0.5])]
    assert first == [False, True, False, False]
    assert [
        judge.hopeless("t0", 0.5, 0.9),
        judge.hopeless("t3", 0.5, 0.4),
        judge.hopeless("t2", 0.5, 1.8),
    ] == [
        False,
        False,
        True,
    ]
    assert not judge.hopeless("t0", 0.25, 99.0), "what was told once stands"


def test_rungs_grow_by_the_reduction() -> None:
    assert rungs(0.1, 3) == pytest.approx([0.1, 0.3, 0.9])
