"""How a run ends when it is told to: a training saves first, what queues is not waited for, the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import distributed, storage
from cluster.errors import Stopped
from cluster.resources import Resources, cpu_count
from pipeline import runner
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


def run(root: str) -> None:
    """Two steps that each want every CPU, so that one of them queues; run by a process of their own."""
    runner.SAVE_S = 600.0  # a test that needs it is a test that fails
    everything = Resources(cpus=cpu_count())
    steps = [
        Step(
            kind="finetune",
            name=name,
            version="v1",
            fn=until_told,
            config=config_of(root),
            resources=everything,
        )
        for name in ("a", "b")
    ]
    Runner(root, "toy", steps).run()


def config_of(root: str | Path) -> toys.ToyConfig:
    return toys.ToyConfig(calls=f"{root}-calls")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "give",
    [lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)],
    ids=["Ctrl-C of a terminal, which Ray's processes get as well", "SIGTERM"],
)
def test_run_that_is_ended_lets_a_training_save_and_the_next_run_goes_on(
    tmp_path: Path, give: Callable[[int], None]
) -> None:
    root, calls = tmp_path / "root", tmp_path / "root-calls" / "work"
    command = [
        sys.executable,
        "-c",
        "import sys; from tests.pipeline.test_stopped_runs import run; run(sys.argv[1])",
    ]
    first = subprocess.Popen([*command, str(root)], start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while not calls.exists() or not list(calls.iterdir()):
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.05)
        give(first.pid)
        assert first.wait() != 0
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    saved = [path.parent.parent.parent.name for path in root.glob("finetune/*/v1/checkpoints/1.json")]
    assert len(saved) == 1 and len(list(calls.iterdir())) == 1, "one had begun, and saved"
    step = Step(kind="finetune", name=saved[0], version="v1", fn=until_told, config=config_of(root))
    [status] = Runner(str(root), "toy", [step], open_session=toys.ThreadSession).run()
    assert status.state is State.DONE and len(list(calls.iterdir())) == 1, "it did not begin anew"
