"""The state of a recipe's steps, as anybody who reads the store sees it."""

from __future__ import annotations

from pathlib import Path

from cluster import storage
from cluster.lease import Lease
from pipeline import doctor
from pipeline.runner import Runner
from pipeline.status import State
from pipeline.step import topological
from stages.context import Progress
from tests.pipeline import toys


def states(root: Path) -> dict[str, tuple[State, str]]:
    return {s.step.id: (s.state, s.note) for s in doctor.survey(str(root), "toy", topological(toys.chain()))}


def test_status_tells_running_interrupted_failed_and_done(tmp_path: Path) -> None:
    out = f"{tmp_path}/finetune/a/v1"
    assert states(tmp_path)["finetune/a/v1"][0] is State.TODO
    with Lease.acquire(f"{out}/lease"):
        Progress(out, total=10, unit="steps").update(4, force=True)
        state, note = states(tmp_path)["finetune/a/v1"]
        assert state is State.RUNNING and "process" in note
    state, note = states(tmp_path)["finetune/a/v1"]
    assert state is State.TODO and "interrupted at 4/10 steps" in note

    Runner(str(tmp_path), "toy", toys.chain(fail="ours"), open_session=toys.ThreadSession).run()
    found = states(tmp_path)
    assert found["finetune/a/v1"][0] is State.FAILED and found["evaluate/b/v1"][0] is State.DONE
    assert storage.exists(f"{out}/failure.json")
