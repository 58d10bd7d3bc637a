"""A training loop without a model: reads batches in lockstep with the other ranks, logs them, saves its cursor.

python -m tests.stages.data.rank_program SPEC.json RANK
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from torch import distributed

from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.view import TrainView


def main(spec: dict, rank: int) -> None:
    """Read from the saved cursor to the end; every step ends with a collective, as training does."""
    torch.set_num_threads(1)
    folder = Path(spec["folder"])
    world_size = spec["world_size"]
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{spec['incarnation']}", rank=rank, world_size=world_size
    )
    dataset = ShardDataset.open(spec["manifest"], "train")
    order = Order(dataset.shard_samples, **spec["order"])
    saved = folder / "cursor.json"
    start = json.loads(saved.read_text()) if saved.exists() else [0, 0]
    log = (folder / f"log-{spec['incarnation']}-{rank}.jsonl").open("w", buffering=1)
    with TrainFeed(
        dataset,
        order,
        TrainView(size=16),
        seed=spec["seed"],
        rank=rank,
        world_size=world_size,
        start=(start[0], start[1]),
        epochs=spec["epochs"],
        loader_workers=spec["loader_workers"],
    ) as feed:
        for batch in feed:
            pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in batch.images]
            line = {
                "epoch": batch.epoch,
                "step": batch.step,
                "ids": batch.sample_ids.tolist(),
                "pixels": pixels,
            }
            print(json.dumps(line), file=log)
            distributed.all_reduce(torch.ones(1))
            position = batch.epoch * order.steps_per_epoch + batch.step + 1
            if rank == 0 and position % spec["save_every"] == 0:
                temporary = saved.with_suffix(".tmp")
                temporary.write_text(json.dumps(divmod(position, order.steps_per_epoch)))
                temporary.replace(saved)
            time.sleep(spec["step_s"])  # so that there is an instant to be killed at
    (folder / f"done-{spec['incarnation']}-{rank}").touch()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
