"""`itpn status` of a training step: everything comes from object storage, plain and as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster import storage
from pipeline import view
from pipeline.status import State, StepStatus
from tests.pipeline.toys import chain

EVENTS = [
    {"event": "step not applied", "step": 41, "reason": "loss not finite on 1 rank(s)"},
    {"event": "rolled back", "step": 43, "to": 40, "reason": "loss not finite on 1 rank(s)"},
]
METRICS = {
    "images_per_s": 512.4, "mfu": 0.412, "data_wait_share": 0.03, "epoch": 1.5,
    "loss": 0.5, "loss_auxiliary": 0.2, "loss_pyramid": 0.3,
}  # fmt: skip


def statuses(root: str, state: State) -> list[StepStatus]:
    """A training step in that state, with what it wrote so far, and one that has not begun."""
    first, second, *_ = (StepStatus(step) for step in chain())
    first.state = state
    out = first.step.output(root)
    progress = {
        "state": "running", "done": 60, "total": 100, "unit": "steps", "eta_s": 75.0, "metrics": METRICS,
        "at": time.time(), "events": EVENTS, "picture": f"{out}/pictures/000000050-a.png",
        "tensorboard": f"{out}/tensorboard",
    }  # fmt: skip
    storage.overwrite(f"{out}/progress.json", json.dumps(progress).encode())  # telemetry may be left out
    for step in (20, 40):
        storage.write_json_exclusive(f"{out}/checkpoints/{step:09d}.json", {})
    storage.write_exclusive(f"{out}/checkpoints/files/000000060-a/rank-00000.safetensors", b"half")
    return [first, second]


def plain(found: list[StepStatus], root: str) -> str:
    console = Console(width=300)
    with console.capture() as captured:
        console.print(view.status_table(found, view.begun(root, found)))
    return captured.get()


def test_status_of_a_running_step_tells_all_that_storage_knows(any_root: str) -> None:
    found = statuses(any_root, State.RUNNING)
    text = plain(found, any_root)
    told = ["60/100 steps", "512 images/s", "MFU 41%", "data wait 3%", "epoch 1.50", "loss 0.5",
            "loss_auxiliary 0.2", "loss_pyramid 0.3", "ETA 1:15", "newest checkpoint: step 40",
            "step 41: step not applied (reason loss not finite on 1 rank(s))",
            "step 43: rolled back (to 40, reason loss not finite on 1 rank(s))",
            "pictures/000000050-a.png", "tensorboard --logdir"]  # fmt: skip
    assert [part for part in told if part not in text] == []
    [first, second] = view.status_json(any_root, found, view.begun(any_root, found))
    json.dumps(first)
    assert first["progress"]["metrics"] == METRICS and first["progress"]["events"] == EVENTS
    assert (first["progress"]["checkpoint"], first["progress"]["eta_s"]) == (40, 75.0)
    assert second["progress"] is None


@pytest.mark.parametrize(("state", "told"), [(State.FAILED, True), (State.DONE, False)])
def test_newest_checkpoint_matters_until_a_step_is_done(tmp_path: Path, state: State, told: bool) -> None:
    text = plain(statuses(str(tmp_path), state), str(tmp_path))
    assert ("newest checkpoint: step 40" in text) is told
    assert "step 43: rolled back" in text and "tensorboard --logdir" in text


def test_before_the_first_checkpoint_status_says_so(tmp_path: Path) -> None:
    found = statuses(str(tmp_path), State.RUNNING)
    storage.delete_tree(f"{found[0].step.output(str(tmp_path))}/checkpoints")
    assert "no checkpoint yet" in plain(found, str(tmp_path))
