"""A feed's memory does not grow from epoch to epoch."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import psutil
import pytest

from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.view import TrainView
from tests.stages.images import shard_folder, write_image_folder

REPOSITORY = Path(__file__).resolve().parents[3]


def sizes_after_epochs(manifest: str, workers: int) -> list[float]:
    """Memory of this process and its children in MB after each of 12 epochs."""
    dataset = ShardDataset.open(manifest, "train")
    order = Order(dataset.shard_samples, seed=1, streams=4, global_batch=32)
    process = psutil.Process()
    sizes: list[float] = []
    with TrainFeed(dataset, order, TrainView(size=224), seed=1, epochs=12, loader_workers=workers) as feed:
        for batch in feed:
            if batch.step == order.steps_per_epoch - 1:
                gc.collect()
                family = [process, *process.children(recursive=True)]
                sizes.append(sum(p.memory_full_info().uss for p in family) / 1e6)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_ten_epochs_do_not_grow_memory(tmp_path: Path, workers: int) -> None:
    source = write_image_folder(tmp_path / "in", train=64, height=375, width=500)
    manifest = shard_folder(source, tmp_path / "out", shard_samples=64).manifest
    # A process of its own: whatever else the test's process has loaded moves by more than the bound.
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.data.test_memory", manifest, str(workers)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    # The first two epochs fill allocators and queues.
    assert len(sizes) == 12
    # A sample holds as many batches in flight (5 MB each) as happen to be; medians do not see those.
    assert median(sizes[7:]) - median(sizes[2:7]) < 10, f"MB after each epoch: {[round(s) for s in sizes]}"


if __name__ == "__main__":
    print(json.dumps(sizes_after_epochs(sys.argv[1], int(sys.argv[2]))))
