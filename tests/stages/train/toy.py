"""A small training run as a script: `python toy.py SPEC.json`, one process per rank. Used by the tests beside it.

The model has drop-out (so that random state matters) and a buffer; samples are made from their ids.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster import distributed
from cluster.errors import ItpnError
from stages.train.config import LoopConfig
from stages.train.loop import Trainer

STEPS_PER_EPOCH = 5


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    epoch: int
    step: int
    replaced: int = 0
    bad: tuple = ()

    def split(self, parts: int) -> Iterator[Batch]:
        size = len(self.images) // parts
        for i in range(parts):
            cut = slice(i * size, (i + 1) * size)
            yield replace(self, images=self.images[cut], labels=self.labels[cut], sample_ids=self.sample_ids[cut])


class Feed:
    def __init__(self, spec: dict, world: distributed.World, start: tuple[int, int], steps: int) -> None:
        self.spec, self.world, self.wait_s = spec, world, 0.0
        self.first, self.end = start[0] * STEPS_PER_EPOCH + start[1], steps

    def __iter__(self) -> Iterator[Batch]:
        total, world = self.spec["loop"]["global_batch"], self.world
        for index in range(self.first, self.end):
            ids = np.arange(index * total, (index + 1) * total)[world.rank :: world.world_size]
            if "samples" in self.spec:
                with open(f"{self.spec['samples']}-{world.rank}", "a") as file:
                    file.write(f"{index} {ids.tolist()}\n")
            images = [np.random.default_rng(int(i)).integers(0, 256, (4, 4, 3), dtype=np.uint8) for i in ids]
            yield Batch(
                torch.from_numpy(np.stack(images)), torch.from_numpy(ids % 5), torch.from_numpy(ids),
                index // STEPS_PER_EPOCH, index % STEPS_PER_EPOCH,
            )  # fmt: skip

    def close(self) -> None:
        pass


class Toy(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(48, 33), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(33))
        self.head = nn.Linear(33, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.head(self.inner(x))


class ToyTask:
    def __init__(self, spec: dict, world: distributed.World) -> None:
        torch.manual_seed(0)
        self.spec, self.world, self.module = spec, world, Toy(spec.get("dropout", 0.2))

    def losses(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        spec, rank = self.spec, self.world.rank
        if step == spec.get("kill_at") and rank == spec.get("kill_rank", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == spec.get("terminate_at") and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == spec.get("hang_at") and rank == 1:
            time.sleep(3600)
        time.sleep(spec.get("step_s", 0))
        x = batch.images.flatten(1).to(next(self.module.parameters()).dtype) / 255
        loss = nn.functional.cross_entropy(model(x).float(), batch.labels)
        if step in spec.get("nan_at", []) and rank == self.world.world_size - 1:
            loss = loss * float("nan")
        if step in spec.get("bad_gradient_at", []) and rank == self.world.world_size - 1:
            loss = loss + (self.module.head.bias.sum() * 0).sqrt()  # finite, with an infinite gradient
        if step in spec.get("spike_at", []):
            loss = loss * 100
        return {"loss": loss, "loss_head": loss.detach()}

    def picture(self, model: Any, batch: Batch) -> Any:
        return batch.images[0].numpy()


def main() -> int:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        world = distributed.init(timeout_s=spec.get("timeout_s", 60), use_gpu=False)
        config = LoopConfig.parse(spec["loop"])
        trainer = Trainer(
            task=ToyTask(spec, world), config=config, world=world, steps_per_epoch=STEPS_PER_EPOCH,
            make_feed=lambda start, steps: Feed(spec, world, start, steps),
            out=spec["out"], attempt=os.environ["ATTEMPT"], identity=config.identity(),
            data_fingerprint=spec.get("data", ["toy"] * world.world_size)[world.rank],
        )  # fmt: skip
        result = trainer.train()
        if world.rank == 0 and "result" in spec:
            Path(spec["result"]).write_text(json.dumps(result))
    except ItpnError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
