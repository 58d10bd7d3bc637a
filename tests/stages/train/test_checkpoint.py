"""Commit marks of checkpoints when two attempts of one run meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.distributed import World
from cluster.errors import ItpnError
from stages.train.checkpoint import Checkpoints
from stages.train.config import CheckpointConfig

ALONE = World(rank=0, world_size=1, local_rank=0, device="cpu")


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
