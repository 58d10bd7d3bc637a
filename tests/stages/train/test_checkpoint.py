"""Commit marks of checkpoints when two attempts of one run meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import storage
from cluster.distributed import World
from cluster.errors import ItpnError, StorageUnavailable
from stages.train.checkpoint import Checkpoints, is_due
from stages.train.config import CheckpointConfig

ALONE = World(rank=0, world_size=1, local_rank=0, device="cpu")


def keeping(out: Path, attempt: str, **config: Any) -> Checkpoints:
    return Checkpoints(str(out), attempt, ALONE, CheckpointConfig(background=False, **config), {})


def commit(checkpoints: Checkpoints, step: int, **means: float) -> None:
    checkpoints.begin(step, {"rank-00000.safetensors": {"weight": torch.arange(3.0)}}, {"means": means}, {})
    checkpoints.drain()


def save(out: Path, attempt: str, identity: dict[str, Any]) -> None:
    checkpoints = Checkpoints(str(out), attempt, ALONE, CheckpointConfig(background=False), identity)
    files = {"rank-00000.safetensors": {"weight": torch.arange(3.0)}}
    try:
        checkpoints.begin(5, files, {"means": {}}, {})
        checkpoints.finish()
        checkpoints.drain()
        assert checkpoints.steps() == [5]
    finally:
        checkpoints.close()


def test_checkpoint_that_a_dying_attempt_committed_stands(tmp_path: Path) -> None:
    save(tmp_path, "first", {"lr": 1})
    mark = (tmp_path / "checkpoints" / "000000005.json").read_bytes()
    save(tmp_path, "second", {"lr": 1})
    assert (tmp_path / "checkpoints" / "000000005.json").read_bytes() == mark


def test_checkpoint_of_another_config_is_not_taken_for_ours(tmp_path: Path) -> None:
    save(tmp_path, "first", {"lr": 1})
    with pytest.raises(ItpnError, match="000000005"):
        save(tmp_path, "second", {"lr": 2})


def test_best_of_an_attempt_before_is_kept_and_gives_way_to_a_better_one(tmp_path: Path) -> None:
    first = keeping(tmp_path, "a", keep_last=1, keep_best=1)
    for step, loss in ((1, 0.9), (2, 0.4), (3, 0.6)):
        commit(first, step, loss=loss)
    assert first.steps() == [2, 3]
    first.close()
    second = keeping(tmp_path, "b", keep_last=1, keep_best=1)
    commit(second, 4, loss=0.5)
    assert second.steps() == [2, 4]
    commit(second, 5, loss=0.3)
    assert second.steps() == [5]
    assert {path.parent.name for path in tmp_path.glob("checkpoints/files/*/*")} == {"000000005-b"}
    second.close()


@pytest.mark.parametrize("keep", [{}, {"keep_best": 1}, {"keep_every_steps": 100}])
def test_newest_checkpoint_is_kept_whatever_its_loss(tmp_path: Path, keep: dict[str, int]) -> None:
    checkpoints = keeping(tmp_path, "a", keep_last=1, **keep)
    for step in (1, 2, 3):
        commit(checkpoints, step, loss=float(step))  # it gets worse and worse
        assert checkpoints.steps()[-1] == step
    checkpoints.close()


def test_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(uri: str) -> None:
        raise StorageUnavailable("the store is away")

    checkpoints = keeping(tmp_path, "a", keep_last=1)
    commit(checkpoints, 1)
    monkeypatch.setattr(storage, "delete", refuse)
    commit(checkpoints, 2)
    assert checkpoints.steps() == [1, 2] and "the store is away" in caplog.text
    monkeypatch.undo()
    commit(checkpoints, 3)
    assert checkpoints.steps() == [3]
    checkpoints.close()


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7, 50])
def test_saves_are_due_at_every_multiple_and_two_gaps_are_never_more_than_the_interval(every: int) -> None:
    steps = [step for step in range(1, 4 * every + 1) if is_due(step, every, background=True)]
    assert {every, 2 * every, 3 * every, 4 * every} <= set(steps)
    # One save is committed before the next begins: at worst, this one's work and that of the one before are not.
    assert all(after - before <= max(every, 2) for before, after in zip([0, *steps], steps[1:], strict=False))
    assert [s for s in range(1, 4 * every + 1) if is_due(s, every, background=False)] == [
        every, 2 * every, 3 * every, 4 * every,
    ]  # fmt: skip
