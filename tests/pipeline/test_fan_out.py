"""Many jobs on a real Ray with two CPU workers: a crash and a kill cost those two jobs and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from cluster.resources import Resources, cpu_count
from pipeline.registry import Registry
from pipeline.runner import Runner, State, StepStatus, exit_code
from pipeline.step import Step
from tests.pipeline import toys

JOBS, CRASHED, KILLED = 12, 4, 7


def jobs(calls: Path, broken: bool) -> list[Step]:
    """Twelve fine-tunings, each followed by its evaluation; two CPU workers share them."""
    template = toys.chain()[0]
    half = Resources(cpus=cpu_count() / 2)
    steps = []
    for number in range(JOBS):
        fail = {CRASHED: "theirs", KILLED: "killed"}.get(number, "") if broken else ""
        config = toys.ToyConfig(value=number, seed=number, fail=fail, calls=str(calls))
        trained = replace(template.inputs["checkpoint"], name=f"j{number}", config=config, resources=half)
        inputs = {"checkpoint": trained}
        steps.append(replace(template, name=f"j{number}", inputs=inputs, resources=half))
    return steps


def run(root: Path, calls: Path, broken: bool) -> dict[str, StepStatus]:
    statuses = Runner(str(root), "toy", jobs(calls, broken)).run()
    return {status.step.id: status for status in statuses}


def called(calls: Path) -> Counter[str]:
    return Counter(item.uri.split("/")[-2] for item in storage.list_files(str(calls)))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_of_twelve_jobs_one_crashed_and_one_killed_ten_finish_and_a_rerun_does_those_two(
    tmp_path: Path,
) -> None:
    root, calls = tmp_path / "root", tmp_path / "calls"
    statuses = run(root, calls, broken=True)
    good = [n for n in range(JOBS) if n not in (CRASHED, KILLED)]
    assert all(statuses[f"evaluate/j{n}/v1"].state is State.DONE for n in good)
    for bad in (CRASHED, KILLED):
        assert statuses[f"finetune/j{bad}/v1"].state is State.FAILED
        assert statuses[f"evaluate/j{bad}/v1"].state is State.BLOCKED
    assert exit_code(list(statuses.values())) == 1
    assert "a bug" in str(statuses[f"finetune/j{CRASHED}/v1"].error)
    assert f"the worker process of 'finetune/j{KILLED}/v1' died" in str(
        statuses[f"finetune/j{KILLED}/v1"].error
    )

    why = {row.step: row for row in Registry(str(root)).runs() if row.outcome != "finished"}
    assert set(why) == {f"{kind}/j{n}/v1" for kind in ("finetune", "evaluate") for n in (CRASHED, KILLED)}
    assert "a bug" in (why[f"finetune/j{CRASHED}/v1"].error or "")
    assert "died" in (why[f"finetune/j{KILLED}/v1"].error or "")
    assert why[f"evaluate/j{KILLED}/v1"].outcome == "skipped"
    assert {row.step for row in Registry(str(root)).results(metric="top1")} == {
        f"evaluate/j{n}/v1" for n in good
    }

    before = called(calls)
    assert all(before[f"finetune-j{n}"] == 1 for n in good)
    again = run(root, calls, broken=False)
    assert all(status.state is State.DONE for status in again.values())
    fresh = {step for step, status in again.items() if not status.reused}
    assert fresh == set(why)
    new = called(calls) - before
    assert new == {f"finetune-j{CRASHED}": 1, f"finetune-j{KILLED}": 1}
    assert len(Registry(str(root)).results(metric="top1")) == JOBS
