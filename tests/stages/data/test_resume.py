"""Killed at any instant and resumed on another number of ranks, a run sees the batches of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from stages.artifacts import DatasetRef
from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.view import TrainView

REPOSITORY = Path(__file__).parents[3]
ORDER = {"seed": 9, "streams": 2, "global_batch": 4, "window": 2}  # 30 samples: 7 steps per epoch
EPOCHS, SEED, SAVE_EVERY = 4, 5, 3
Batches = dict[tuple[int, int], dict[int, str]]  # cursor -> sample id -> hash of its pixels


def start(folder: Path, ref: DatasetRef, incarnation: int, world_size: int, loader_workers: int) -> list:
    spec = {
        "folder": str(folder),
        "manifest": ref.manifest,
        "order": ORDER,
        "epochs": EPOCHS,
        "seed": SEED,
        "save_every": SAVE_EVERY,
        "step_s": 0.05,
        "world_size": world_size,
        "incarnation": incarnation,
        "loader_workers": loader_workers,
    }
    path = folder / f"spec-{incarnation}.json"
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "tests.stages.data.rank_program", str(path)]
    return [subprocess.Popen([*command, str(rank)], cwd=REPOSITORY) for rank in range(world_size)]


def logged(folder: Path, incarnation: int, world_size: int) -> Batches:
    """Batches that all ranks of an incarnation have read."""
    found: dict[tuple[int, int], list[dict]] = defaultdict(list)
    for rank in range(world_size):
        path = folder / f"log-{incarnation}-{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            if line.endswith("}"):  # the last one may be cut short by the kill
                entry = json.loads(line)
                found[entry["epoch"], entry["step"]].append(entry)
    return {
        cursor: {i: p for part in parts for i, p in zip(part["ids"], part["pixels"], strict=True)}
        for cursor, parts in found.items()
        if len(parts) == world_size
    }


def undisturbed(ref: DatasetRef) -> Batches:
    dataset = ShardDataset.open(ref.manifest, "train")
    order = Order(dataset.shard_samples, **ORDER)
    with TrainFeed(dataset, order, TrainView(size=16), seed=SEED, epochs=EPOCHS) as feed:
        return {
            (batch.epoch, batch.step): {
                i: hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]
                for i, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)
            }
            for batch in feed
        }


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes that import torch: 15 s on an idle machine
def test_kill_and_resume_on_2_then_1_then_2_ranks(tiny_dataset: DatasetRef, tmp_path: Path) -> None:
    expected = undisturbed(tiny_dataset)
    assert len(expected) == EPOCHS * 7
    seen: Batches = {}
    first = (0, 0)
    # Killed in the middle of epoch 1, then of epoch 2, then left alone; with and without loader processes.
    for incarnation, (world_size, workers, kill_after) in enumerate([(2, 0, 10), (1, 1, 8), (2, 0, None)]):
        ranks = start(tmp_path, tiny_dataset, incarnation, world_size, workers)
        try:
            deadline = time.monotonic() + 300
            while kill_after is not None and len(logged(tmp_path, incarnation, world_size)) < kill_after:
                assert time.monotonic() < deadline
                assert all(rank.poll() is None for rank in ranks), "a rank ended before it was killed"
                time.sleep(0.01)
            if kill_after is not None:
                for rank in ranks:
                    rank.send_signal(signal.SIGKILL)
            codes = [rank.wait(300) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0 if kill_after is None else -signal.SIGKILL] * world_size
        batches = logged(tmp_path, incarnation, world_size)
        assert min(batches) == first, "resumed at the saved cursor"
        for cursor, batch in batches.items():
            assert batch == expected[cursor], f"batch {cursor} on {world_size} ranks"
        seen |= batches
        first = tuple(json.loads((tmp_path / "cursor.json").read_text()))
    assert seen.keys() == expected.keys(), "nothing was missed"
