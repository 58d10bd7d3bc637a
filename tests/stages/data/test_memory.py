"""A feed's memory does not grow from epoch to epoch."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest

from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.view import TrainView
from tests.stages.images import shard_folder, write_image_folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_ten_epochs_do_not_grow_memory(tmp_path: Path, workers: int) -> None:
    source = write_image_folder(tmp_path / "in", train=64, height=375, width=500)
    dataset = ShardDataset.open(shard_folder(source, tmp_path / "out", shard_samples=64).manifest, "train")
    order = Order(dataset.shard_samples, seed=1, streams=4, global_batch=32)
    process = psutil.Process()
    sizes: list[float] = []
    with TrainFeed(dataset, order, TrainView(size=224), seed=1, epochs=12, loader_workers=workers) as feed:
        for batch in feed:
            if batch.step == order.steps_per_epoch - 1:
                gc.collect()
                family = [process, *process.children(recursive=True)]
                sizes.append(sum(p.memory_full_info().uss for p in family) / 1e6)
    # The first two epochs fill allocators and queues.
    assert len(sizes) == 12
    assert max(sizes[7:]) - max(sizes[2:7]) < 10, f"MB after each epoch: {[round(s) for s in sizes]}"
