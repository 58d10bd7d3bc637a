"""How a run ends when it is told to: a training saves first, what queues is not waited for, the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster import distributed, storage
from cluster.errors import ItpnError, StepFailed, Stopped, WorkerLost
from cluster.resources import Resources, cpu_count
from pipeline import runner
from pipeline.commands.common import guarded
from pipeline.runner import Runner
from pipeline.status import State
from pipeline.step import Step
from stages.artifacts import Outcome
from stages.context import StageContext
from tests.pipeline import toys


def until_told(config: toys.ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
    """Work until it is asked to stop, then save; go on from what was saved."""
    marks = storage.join(context.out, "checkpoints")
    if not storage.exists(storage.join(marks, "1.json")):
        spec = {"attempt": context.attempt, "marks": marks, "calls": config.calls}
        context.executor.workers(work, spec, context.resources)
    return toys.train(config, inputs, context)


def work(spec: dict) -> dict:
    storage.write_exclusive(storage.join(spec["calls"], "work", spec["attempt"]), b"")
    while not distributed.stop_requested():
        time.sleep(0.05)
    time.sleep(1)  # that a save takes
    storage.write_exclusive(storage.join(spec["marks"], "1.json"), b"")
    raise Stopped("saved at step 1")


def deaf(config: toys.ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
    """Say that it saves when it is asked to, and do not."""
    spec = {
        "attempt": context.attempt,
        "marks": storage.join(context.out, "checkpoints"),
        "calls": config.calls,
    }
    context.executor.workers(stay, spec, context.resources)
    raise AssertionError("it is killed")


def stay(spec: dict) -> dict:
    storage.write_exclusive(storage.join(spec["calls"], "work", spec["attempt"]), b"")
    while not distributed.stop_requested():
        time.sleep(0.05)
    storage.write_exclusive(storage.join(spec["calls"], "asked", spec["attempt"]), b"")
    time.sleep(600)
    return {}


def run(root: str, stage: str) -> None:
    """Two steps that each want every CPU, so that one of them queues; run by a process of their own."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what runs in the background inherits that it is ignored
    runner.SAVE_S = 600.0  # a test that needs it is a test that fails
    fn, everything = {"until_told": until_told, "deaf": deaf}[stage], Resources(cpus=cpu_count())
    steps = [
        Step(kind="finetune", name=name, version="v1", fn=fn, config=config_of(root), resources=everything)
        for name in ("a", "b")
    ]
    told = Runner(root, "toy", steps)
    try:
        guarded(told.run)()
    except typer.Exit as end:
        print(*sorted(status.state.value for status in told.status.values()))
        sys.exit(end.exit_code)


def config_of(root: str | Path) -> toys.ToyConfig:
    return toys.ToyConfig(calls=f"{root}-calls")


def some(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def run_and_end(root: Path, stage: str, *ends: tuple[str, Callable[[int], None]]) -> tuple[int, str, str]:
    """Run in a process; when there is a file in a folder of the calls, tell its id to the function; for each in turn.

    Returns the exit code and what was printed.
    """
    program = f"import sys; from tests.pipeline.test_stopped_runs import run; run(sys.argv[1], {stage!r})"
    with open(f"{root}-out", "w+") as out, open(f"{root}-err", "w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(root)],
            start_new_session=True,
            stdout=out,
            stderr=err,
            text=True,
        )
        try:
            for folder, end in ends:
                while not some(Path(f"{root}-calls", folder)):
                    assert process.poll() is None, Path(err.name).read_text()
                    time.sleep(0.05)
                end(process.pid)
            code = process.wait(200)
        finally:
            if process.poll() is None:
                print(Path(err.name).read_text())
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, Path(out.name).read_text(), Path(err.name).read_text()


def ctrl_c(pid: int) -> None:
    """As a terminal does it: Ray's processes get the signal as well."""
    os.killpg(pid, signal.SIGINT)


def sigterm(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("end", "code"), [(ctrl_c, 130), (sigterm, 143)])
def test_run_that_is_ended_lets_a_training_save_and_the_next_run_goes_on(
    tmp_path: Path, end: Callable[[int], None], code: int
) -> None:
    root, calls = tmp_path / "root", tmp_path / "root-calls" / "work"
    found, out, err = run_and_end(root, "until_told", ("work", end))
    assert found == code and "run the same command again to go on" in err
    assert out.split() == ["stopped", "stopped"]
    saved = [path.parent.parent.parent.name for path in root.glob("finetune/*/v1/checkpoints/1.json")]
    assert len(saved) == 1 and len(some(calls)) == 1, "one had begun, and saved"
    step = Step(kind="finetune", name=saved[0], version="v1", fn=until_told, config=config_of(root))
    [status] = Runner(str(root), "toy", [step], open_session=toys.ThreadSession).run()
    assert status.state is State.DONE and len(some(calls)) == 1, "it did not begin anew"


@pytest.mark.timeout(300)
def test_second_interrupt_does_not_wait_for_the_save(tmp_path: Path) -> None:
    code, out, _ = run_and_end(tmp_path / "root", "deaf", ("work", ctrl_c), ("asked", ctrl_c))
    assert code == 130 and out.split()


class SavingSession(toys.ThreadSession):
    """Its tasks have something to save."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.cancelled, self.forgotten = threading.Event(), threading.Event(), threading.Event()

    def submit(self, fn: Callable[..., Any], *args: Any, resources: Resources, name: str) -> Any:
        job = super().submit(fn, *args, resources=resources, name=name)
        job.cancel = self.cancelled.set  # type: ignore[method-assign]
        return job

    def ask_to_stop(self, attempt: str) -> bool:
        self.asked.set()
        return True

    def forget(self, attempt: str) -> None:
        self.forgotten.set()


@pytest.mark.parametrize(
    ("end", "state", "told"),
    [
        (None, State.DONE, ""),
        (Stopped("saved at step 7"), State.STOPPED, "saved at step 7"),
        (WorkerLost("rank 1 died of the order"), State.STOPPED, "rank 1 died of the order"),
        (StepFailed("no room for the checkpoint"), State.FAILED, "no room for the checkpoint"),
        (TimeoutError(), State.STOPPED, "it had not saved after 0 s"),
    ],
)
def test_step_ends_as_its_training_does_after_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Exception | None, state: State, told: str
) -> None:
    session = SavingSession()

    def stage(config: toys.ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
        os.kill(os.getpid(), signal.SIGINT)
        assert (session.cancelled if isinstance(end, TimeoutError) else session.asked).wait(60)
        if isinstance(end, ItpnError):
            raise end
        return toys.train(config, inputs, context)

    if isinstance(end, TimeoutError):
        monkeypatch.setattr(runner, "SAVE_S", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    step = Step(kind="finetune", name="a", version="v1", fn=stage, config=toys.ToyConfig())
    stopped = Runner(str(tmp_path), "toy", [step], open_session=lambda: session)  # type: ignore[arg-type, return-value]
    try:
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    finally:
        signal.signal(signal.SIGINT, before)
    [status] = stopped.status.values()
    assert status.state is state
    assert told in str(status.error or "")
    failed = state is State.FAILED
    assert storage.exists(f"{step.output(str(tmp_path))}/failure.json") == failed
    assert session.cancelled.is_set() == isinstance(end, TimeoutError)
    assert session.forgotten.is_set() == (end is not None), "what a task that ended badly may leave behind"
