"""Many jobs on a real Ray: a crash and a kill cost those two jobs and nothing else; small ones share a GPU."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from cluster.jobs import Session
from cluster.resources import Resources, cpu_count
from pipeline.registry import Registry
from pipeline.runner import Runner
from pipeline.status import State, StepStatus, exit_code
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


SHARED = 4  # jobs that one GPU has room for, at a quarter each


def meet(config, inputs, context):
    """Leave only when as many jobs as share the GPU have come; tell how many were there, and which GPU was given."""
    folder, name = config.calls, context.out.split("/")[-2]

    def there(what: str) -> int:
        return len(storage.list_files(storage.join(folder, what)))

    storage.write_exclusive(storage.join(folder, "came", name), b"")
    at_once = there("came") - there("left")
    deadline = time.monotonic() + 120
    while there("came") < SHARED:
        assert time.monotonic() < deadline, f"{there('came')} of {SHARED} jobs run side by side"
        time.sleep(0.05)
    facts = {"at_once": at_once, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    storage.write_exclusive(storage.join(folder, "told", name), json.dumps(facts).encode())
    outcome = toys.train(config.model_copy(update={"calls": ""}), inputs, context)
    storage.write_exclusive(storage.join(folder, "left", name), b"")
    return outcome


class OneGpu(Session):
    """A real local Ray that is told of one GPU, and of CPUs for more jobs than may share it."""

    def __init__(self) -> None:
        import ray

        self._local = True
        ray.init(
            address="local",
            num_cpus=2 * SHARED,
            num_gpus=1,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_four_jobs_of_a_quarter_gpu_run_side_by_side_and_no_fifth(tmp_path: Path) -> None:
    template = toys.replace_function(toys.chain()[0].inputs["checkpoint"], meet)
    steps = [
        replace(
            template,
            name=f"j{number}",
            config=toys.ToyConfig(seed=number, calls=str(tmp_path / "met")),
            resources=Resources(cpus=1, gpus=1 / SHARED),
        )
        for number in range(SHARED + 2)
    ]
    runner = Runner(str(tmp_path / "root"), "toy", steps, open_session=OneGpu)
    assert {status.state for status in runner.run()} == {State.DONE}
    told = [
        json.loads(storage.read_bytes(item.uri)) for item in storage.list_files(str(tmp_path / "met/told"))
    ]
    assert len(told) == SHARED + 2 and {item["gpu"] for item in told} == {"0"}
    assert max(item["at_once"] for item in told) <= SHARED
