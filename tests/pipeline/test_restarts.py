"""How often the runner starts a step again, after what; and what the step is said to have cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from cluster.errors import ItpnError, StepFailed, Stopped, StorageRefused, StorageUnavailable, WorkerLost
from cluster.resources import Resources
from pipeline.runner import Runner
from pipeline.status import State, StepStatus
from stages.artifacts import Outcome
from stages.context import StageContext
from tests.pipeline import toys

LOST = WorkerLost("the worker process of 'finetune/a/v1' died")
FULL = StepFailed("rank 1 could not write the checkpoint of step 8", found="No space left on device")


def run(
    root: Path, errors: list[ItpnError], *, workers: int = 1, retries: int = 0, groups: tuple[float, ...] = ()
) -> tuple[StepStatus, list[str]]:
    """One step that meets the errors, one in each start, then ends well; its status and the attempts it made."""
    attempts: list[str] = []

    def stage(config: toys.ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
        attempts.append(context.attempt)
        context.executor.worker_seconds.extend(groups)
        if len(attempts) <= len(errors):
            raise errors[len(attempts) - 1]
        return toys.train(config, inputs, context)

    step = toys.chain()[0].inputs["checkpoint"]
    step = replace(step, retries=retries, resources=Resources(workers=workers, min_workers=1, gpus=1, cpus=2))
    step = toys.replace_function(step, stage)
    [status] = Runner(str(root), "toy", [step], open_session=toys.ThreadSession).run()
    return status, attempts


@pytest.mark.parametrize("error", [LOST, StorageUnavailable("the store is away")])
def test_single_worker_is_started_again_three_times_in_a_row_as_a_group_is(tmp_path, error) -> None:
    status, attempts = run(tmp_path / "a", [error] * 3)
    assert status.state is State.DONE and len(set(attempts)) == 4
    status, attempts = run(tmp_path / "b", [error] * 4)
    assert status.state is State.FAILED and status.error is error and len(attempts) == 4
    status, attempts = run(tmp_path / "c", [error] * 7, retries=1)
    assert status.state is State.DONE and len(attempts) == 8


def test_group_was_restarted_by_its_executor_so_only_retries_remain(tmp_path) -> None:
    status, attempts = run(tmp_path / "a", [LOST], workers=2)
    assert status.state is State.FAILED and len(attempts) == 1
    status, attempts = run(tmp_path / "b", [LOST], workers=2, retries=1)
    assert status.state is State.DONE and len(attempts) == 2


@pytest.mark.parametrize("error", [FULL, StorageRefused("no room at the root")])
def test_error_that_another_start_would_meet_again_ends_the_step_at_once(tmp_path, error) -> None:
    status, attempts = run(tmp_path, [error], retries=5)
    assert status.state is State.FAILED and len(attempts) == 1
    assert status.error is error
    told = storage.read_json(f"{status.step.output(str(tmp_path))}/failure.json")
    assert told["error"] == str(error) and told["exit_code"] == error.exit_code


def test_cost_of_an_elastic_run_counts_each_group_by_its_size(tmp_path) -> None:
    status, _ = run(tmp_path, [], workers=4, groups=(4 * 10.0, 2 * 30.0))
    assert status.record is not None
    assert (status.record.gpu_seconds, status.record.cpu_seconds) == (100.0, 200.0)


def test_step_that_others_stopped_is_no_failure(tmp_path) -> None:
    status, attempts = run(tmp_path / "a", [Stopped("saved at step 8")] * 2, retries=1)
    assert status.state is State.STOPPED and len(attempts) == 2
    assert not storage.exists(f"{status.step.output(str(tmp_path / 'a'))}/failure.json")
    status, attempts = run(tmp_path / "b", [Stopped("saved at step 8")], retries=1)
    assert status.state is State.DONE and len(attempts) == 2
