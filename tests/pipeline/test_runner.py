"""The runner on toy stages and real local storage: what is done stays done, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import ConfigError, DriftError, StorageUnavailable
from cluster.resources import Resources
from pipeline.registry import Registry
from pipeline.runner import Runner
from pipeline.status import State, exit_code
from tests.pipeline import toys

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_calls() -> None:
    toys.CALLS.clear()
    toys.ThreadSession.opened = 0


def run(root: Path, **kwargs) -> list:
    steps = kwargs.pop("steps", None) or toys.chain(**kwargs.pop("toy", {}))
    return Runner(str(root), "toy", steps, open_session=toys.ThreadSession, **kwargs).run()


def states(statuses: list) -> dict[str, State]:
    return {status.step.id: status.state for status in statuses}


def test_rerun_skips_finished_steps_and_opens_no_session(tmp_path: Path) -> None:
    assert set(states(run(tmp_path)).values()) == {State.DONE}
    assert len(toys.CALLS) == 4
    again = run(tmp_path)
    assert all(status.reused for status in again)
    assert len(toys.CALLS) == 4
    assert toys.ThreadSession.opened == 1


def test_failure_stops_its_dependents_only(tmp_path: Path) -> None:
    statuses = run(tmp_path, toy={"fail": "ours"})
    assert states(statuses) == {
        "finetune/a/v1": State.FAILED,
        "evaluate/a/v1": State.BLOCKED,
        "finetune/b/v1": State.DONE,
        "evaluate/b/v1": State.DONE,
    }
    assert exit_code(statuses) == 5
    assert sum("finetune/a" in call for call in toys.CALLS) == 1, "an error of ours is not retried"
    assert storage.read_json(f"{tmp_path}/finetune/a/v1/failure.json")["exit_code"] == 5
    healed = run(tmp_path)
    assert set(states(healed).values()) == {State.DONE}
    assert sum("finetune/b" in call for call in toys.CALLS) == 1


def test_unexpected_error_is_told_with_its_text(tmp_path: Path) -> None:
    statuses = run(tmp_path, toy={"fail": "theirs"})
    failed = next(status for status in statuses if status.state is State.FAILED)
    assert "a bug" in str(failed.error)
    assert exit_code(statuses) == 1


def test_changed_config_is_drift_and_names_the_field(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(DriftError, match=r"config\.value: 3\.0 -> 4\.0") as caught:
        run(tmp_path, toy={"value": 4.0})
    assert caught.value.exit_code == 2
    assert "--set version" in str(caught.value)
    assert set(states(run(tmp_path, toy={"value": 4.0, "version": "v2"})).values()) == {State.DONE}


def test_checkpoints_are_not_continued_under_another_config(tmp_path: Path) -> None:
    run(tmp_path, toy={"fail": "after a checkpoint"})
    with pytest.raises(DriftError, match="finetune/a/v1"):
        run(tmp_path, toy={"value": 9.0})


def test_step_that_left_no_checkpoint_may_be_begun_under_another_config(tmp_path: Path) -> None:
    run(tmp_path, toy={"fail": "ours"})
    assert set(states(run(tmp_path, toy={"value": 9.0})).values()) == {State.DONE}
    assert not storage.exists(f"{tmp_path}/finetune/a/v1/failure.json"), (
        "an old failure is not shown any more"
    )


def test_step_that_never_fits_is_refused_before_anything_runs(tmp_path: Path) -> None:
    steps = [replace(toys.chain()[0], resources=Resources(workers=65))]
    with pytest.raises(ConfigError, match="asks for more than there is"):
        run(tmp_path, steps=steps)
    assert not toys.CALLS


def test_outage_of_the_registry_is_no_failure_and_is_made_up_for(tmp_path: Path, monkeypatch) -> None:
    def away(*_: object) -> int:
        raise StorageUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "publish", lambda self, records: away() if records else 0)
        assert set(states(run(tmp_path)).values()) == {State.DONE}
    assert len(toys.CALLS) == 4, "no step is run again for it"
    run(tmp_path)
    assert len(Registry(str(tmp_path)).results()) == 4


def test_lost_lease_ends_the_task_and_the_step(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/finetune/a/v1/lease"

    def robbed(config, inputs, context):
        storage.write_exclusive(storage.join(prefix, "00000002.json"), b"{}")
        time.sleep(3)
        return toys.train(config, inputs, context)

    steps = [toys.replace_function(toys.chain()[0].inputs["checkpoint"], robbed)]
    statuses = run(tmp_path, steps=steps)
    assert exit_code(statuses) == 3
    assert not storage.exists(f"{tmp_path}/finetune/a/v1/record.json")


def test_events_lost_by_a_kill_between_record_and_registry_are_published_by_the_next_run(
    tmp_path: Path,
) -> None:
    run(tmp_path)
    before = Registry(str(tmp_path)).results()
    storage.delete_tree(f"{tmp_path}/registry")
    run(tmp_path)
    assert Registry(str(tmp_path)).results() == before
    assert len(before) == 4


def test_second_runner_waits_and_reuses_the_result(tmp_path: Path) -> None:
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(run(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(toys.CALLS) == 4, "three runs together, each step once"
    assert all(set(states(r).values()) == {State.DONE} for r in results)


def test_no_wait_ends_with_code_3_when_another_runner_holds_the_lease(tmp_path: Path) -> None:
    from cluster.lease import Lease

    with Lease.acquire(f"{tmp_path}/finetune/a/v1/lease"):
        statuses = run(tmp_path, wait_for_lease=False)
    assert states(statuses)["finetune/a/v1"] is State.FAILED
    assert exit_code(statuses) == 3


_SLEEPER = """
import sys, time
sys.path.insert(0, {repository!r})
from pipeline.runner import Runner
from tests.pipeline import toys
real = toys.train
def slow(config, inputs, context):
    print("began", flush=True)
    time.sleep(60)
slow.__module__, slow.__qualname__ = real.__module__, real.__qualname__
toys.train = slow
Runner({root!r}, "toy", toys.chain()[:1], open_session=toys.ThreadSession).run()
"""


def test_killed_runner_is_replaced_at_once(tmp_path: Path) -> None:
    code = _SLEEPER.format(repository=str(REPOSITORY), root=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None and child.stdout.readline() == "began\n"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    began = time.monotonic()
    statuses = run(tmp_path)
    assert set(states(statuses).values()) == {State.DONE}
    assert time.monotonic() - began < 20, "the dead holder's lease must not be waited for"


def test_stop_releases_the_lease_and_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.lease import Lease

    began = threading.Event()

    def endless(config, inputs, context):
        began.set()
        time.sleep(5)
        return toys.train(config, inputs, context)

    steps = [toys.replace_function(toys.chain()[0].inputs["checkpoint"], endless)]
    runner = Runner(str(tmp_path), "toy", steps, open_session=toys.ThreadSession)

    def interrupt(*_: object, **__: object) -> None:
        assert began.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.runner.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert not storage.exists(f"{tmp_path}/finetune/a/v1/failure.json")
    with Lease.acquire(f"{tmp_path}/finetune/a/v1/lease", wait_s=0):
        pass


def ends(root: Path) -> list[tuple[str, str, int]]:
    return [(row.step, row.outcome, row.exit_code) for row in Registry(str(root)).runs()]


def test_every_end_of_a_step_is_registered_with_its_cause(tmp_path: Path) -> None:
    run(tmp_path, toy={"fail": "ours"})
    assert sorted(ends(tmp_path)) == [
        ("evaluate/a/v1", "skipped", 0),
        ("evaluate/b/v1", "finished", 0),
        ("finetune/a/v1", "failed", 5),
        ("finetune/b/v1", "finished", 0),
    ]
    why = {row.step: row.error for row in Registry(str(tmp_path)).runs()}
    assert "toy data are broken" in why["finetune/a/v1"] and "mend them" in why["finetune/a/v1"]
    assert why["evaluate/a/v1"] == "its input finetune/a/v1 failed: toy data are broken"
    run(tmp_path)
    assert sorted(ends(tmp_path)).count(("finetune/b/v1", "finished", 0)) == 1
    assert {("finetune/a/v1", "finished", 0), ("evaluate/a/v1", "finished", 0)} < set(ends(tmp_path))


def test_skipped_step_names_the_first_failure_up_the_chain(tmp_path: Path) -> None:
    evaluated = toys.chain(fail="ours")[0]
    last = replace(evaluated, name="a-again", inputs={"checkpoint": evaluated})
    statuses = run(tmp_path, steps=[last])
    assert states(statuses)["evaluate/a-again/v1"] is State.BLOCKED
    skipped = {row.step: row.error for row in Registry(str(tmp_path)).runs() if row.outcome == "skipped"}
    assert skipped.keys() == {"evaluate/a/v1", "evaluate/a-again/v1"}
    assert all(text.startswith("its input finetune/a/v1 failed") for text in skipped.values())


def test_failure_that_cannot_be_registered_is_still_only_a_failed_step(tmp_path: Path, monkeypatch) -> None:
    def away(*_: object) -> None:
        raise StorageUnavailable("away")

    monkeypatch.setattr(Registry, "publish_run", away)
    statuses = run(tmp_path, toy={"fail": "ours"})
    assert states(statuses)["finetune/a/v1"] is State.FAILED
    assert states(statuses)["evaluate/b/v1"] is State.DONE
    assert exit_code(statuses) == 5


def test_step_that_another_runner_holds_did_not_end_here(tmp_path: Path) -> None:
    from cluster.lease import Lease

    with Lease.acquire(f"{tmp_path}/finetune/a/v1/lease"):
        run(tmp_path, wait_for_lease=False)
    assert {step for step, *_ in ends(tmp_path)} == {"finetune/b/v1", "evaluate/b/v1"}
