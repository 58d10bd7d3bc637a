"""Small training runs as a script: `python toy.py SPEC.json`, one process per rank. Used by the tests beside it.

The model has drop-out (so that random state matters) and a buffer; samples are made from their ids.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster import distributed, storage
from cluster.errors import ItpnError
from stages.train import loop, state
from stages.train.config import LoopConfig
from stages.train.layout import checkpoint_steps, manifest_uri
from stages.train.loop import Trainer
from stages.train.optim import parameter_groups
from stages.train.schedule import make_schedule

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
            yield replace(
                self, images=self.images[cut], labels=self.labels[cut], sample_ids=self.sample_ids[cut]
            )


class Killer:
    """Kills this process inside the saves that the spec lists, each only once over all restarts.

    A kill is {"where": "before upload_file", "step": 8, "rank": 0, "call": 1}: before the second file of step 8.
    """

    def __init__(self) -> None:
        self.kills: list[dict[str, Any]] = []
        self.calls: dict[tuple[str, int], int] = {}

    def install(self, spec: dict[str, Any], rank: int) -> None:
        """Watch the calls that make a save: writing a local file, uploading it, committing the manifest."""
        self.folder, self.slow_s = Path(spec.get("marks", spec["out"])), spec.get("upload_s", 0.0)
        self.kills = [{"index": i, "call": 0, **k} for i, k in enumerate(spec["kills"]) if k["rank"] == rank]
        for module, name in (
            (state, "save_file"),
            (storage, "upload_file"),
            (storage, "write_json_exclusive"),
        ):
            setattr(module, name, self._watched(getattr(module, name), name))

    def at(self, where: str, step: int, call: int) -> None:
        for kill in self.kills:
            if (kill["where"], kill["step"], kill["call"]) == (where, step, call):
                try:
                    (self.folder / f"killed-{kill['index']}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)

    def _watched(self, function: Any, name: str) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            texts = " ".join(str(arg) for arg in args if isinstance(arg, (str, Path)))
            step = int(re.findall(r"\b\d{9}\b", texts)[0])
            call = self.calls.get((name, step), 0)
            self.calls[name, step] = call + 1
            if name == "upload_file":
                time.sleep(self.slow_s)
                while call > 0 and (self.folder / "hold-uploads").exists():
                    time.sleep(0.01)
            if name == "save_file" and any(k["where"] == "half save_file" for k in self.kills):
                Path(args[1]).write_bytes(b"half a file")
                self.at("half save_file", step, call)
            self.at(f"before {name}", step, call)
            if any(k["where"] == f"during {name}" for k in self.kills):
                Timer(0.003, self.at, (f"during {name}", step, call)).start()
            result = function(*args, **kwargs)
            self.at(f"after {name}", step, call)
            return result

        return watched


killer = Killer()


def stand_at_gate(spec: dict[str, Any], step: int) -> None:
    """Go no further than the step that the file `gate` names, where there is one, so that a test may be late."""
    gate = Path(spec.get("marks", ""), "gate")
    while "marks" in spec and gate.exists():
        with suppress(FileNotFoundError):
            if step <= int(gate.read_text()):
                return
        time.sleep(0.01)


def partition_facts(engine: Any) -> dict[str, Any]:
    """What of the state this rank holds, read from DeepSpeed's own structures."""
    parameters = list(engine.module.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return {
        "stage": engine.model.zero_optimization_stage(),
        "parameters": whole,
        "resident": sum(p.data.numel() for p in parameters),
        "optimiser": sum(t.numel() for s in engine.optimiser.state.values() for t in s.values() if t.dim())
        // 2,
    }


class Feed:
    def __init__(self, spec: dict, world: distributed.World, start: tuple[int, int], steps: int) -> None:
        self.spec, self.world, self.wait_s = spec, world, 0.0
        self.first, self.end = start[0] * STEPS_PER_EPOCH + start[1], steps
        self.bad_limit = spec.get("bad_limit", 0)

    def __iter__(self) -> Iterator[Batch]:
        total, world = self.spec["loop"]["global_batch"], self.world
        note_start(self.spec, self.first)
        for index in range(self.first, self.end):
            ids = np.arange(index * total, (index + 1) * total)[world.rank :: world.world_size]
            note_batch(self.spec, world.rank, index, ids)
            images = [np.random.default_rng(int(i)).integers(0, 256, (4, 4, 3), dtype=np.uint8) for i in ids]
            lost = [
                entry for at, rank, *entry in self.spec.get("bad_at", ()) if (at, rank) == (index, world.rank)
            ]
            yield Batch(
                torch.from_numpy(np.stack(images)), torch.from_numpy(ids % 5), torch.from_numpy(ids),
                index // STEPS_PER_EPOCH, index % STEPS_PER_EPOCH, len(lost), tuple(lost),
            )  # fmt: skip

    def close(self) -> None:
        pass


def note_start(spec: dict, first: int) -> None:
    """Write down with which step a start began, and what was committed then (rank 0 of a run with kills knows)."""
    if "committed" in spec:
        with open(f"{spec['samples']}-starts", "a") as file:
            file.write(json.dumps({"committed": spec["committed"], "resumed": first}) + "\n")


def note_batch(spec: dict, rank: int, index: int, ids: np.ndarray) -> None:
    """Write down what a rank takes in a step."""
    if "samples" in spec:
        with open(f"{spec['samples']}-{rank}", "a") as file:
            file.write(f"{index} {ids.tolist()}\n")


class NotedFeed:
    """The real feed, of a sharded data set; what it yields is written down as `Feed` does."""

    def __init__(self, feed: Any, spec: dict, world: distributed.World, first: int, epoch: int) -> None:
        self.feed, self.spec, self.world, self.first, self.epoch = feed, spec, world, first, epoch
        self.bad_limit, self.close = feed.bad_limit, feed.close

    @property
    def wait_s(self) -> float:
        return self.feed.wait_s

    def __iter__(self) -> Iterator[Any]:
        note_start(self.spec, self.first)
        for batch in self.feed:
            index = batch.epoch * self.epoch + batch.step
            note_batch(self.spec, self.world.rank, index, batch.sample_ids.numpy())
            yield batch


def open_feed(spec: dict, world: distributed.World, config: LoopConfig) -> tuple[int, Any, str]:
    """Steps per epoch, what opens a feed, and the data's fingerprint: of made samples, or of spec["manifest"]."""
    if "manifest" not in spec:
        data = spec.get("data", ["toy"] * world.world_size)[world.rank]
        return STEPS_PER_EPOCH, lambda start, end: Feed(spec, world, start, end), data
    from stages.data.config import DataConfig
    from stages.data.view import TrainView
    from stages.train.feeds import open_training_data

    view = DataConfig(view=TrainView(size=8), streams=4, window=2)
    dataset, order, make = open_training_data(config, view, spec["manifest"], split="train", world=world)
    epoch = order.steps_per_epoch

    def opened(start: tuple[int, int], end: int) -> NotedFeed:
        return NotedFeed(make(start, end), spec, world, start[0] * epoch + start[1], epoch)

    return epoch, opened, dataset.fingerprint


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
        self.partition: dict[str, Any] = {}
        self.statistics: dict[int, Any] = {}  # what the guard and the running means knew when a step began
        self.trainer: Any = None

    def losses(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        spec, rank = self.spec, self.world.rank
        if step == spec.get("kill_at") and rank == spec.get("kill_rank", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == spec.get("terminate_at") and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(spec.get("step_s", 0))
        stand_at_gate(spec, step)
        if step == spec.get("disk_full_at"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        if step in spec.get("late_at", []) and rank == 1:
            self.trainer._saved_at = -math.inf
        if self.trainer is not None:
            self.statistics[step] = [self.trainer.guard.state(), asdict(self.trainer.smoothed)]
        if step == spec.get("lowest_scale_at"):
            self.trainer.engine.model.optimizer.loss_scaler.cur_scale = 1.0
        if step == 3 and self.trainer is not None:
            self.partition = partition_facts(self.trainer.engine)
        every = batch.images.shape[1] // 4  # real views are larger than the 4 x 4 pixels of the model
        x = batch.images[:, ::every, ::every].flatten(1).to(next(self.module.parameters()).dtype) / 255
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


def plain_ddp(spec: dict, world: distributed.World, config: LoopConfig) -> dict:
    """The same run by torch's DistributedDataParallel and AdamW alone: what ZeRO is compared with."""
    schedule = make_schedule(config.schedule, config.optimiser.lr, STEPS_PER_EPOCH)
    task = ToyTask(spec, world)
    module = task.module
    groups = parameter_groups(module, config.optimiser)
    names = [group.pop("names") for group in groups]
    assert names
    optimiser = torch.optim.AdamW(groups, betas=config.optimiser.betas, eps=config.optimiser.eps)
    model = nn.parallel.DistributedDataParallel(module)
    losses = []
    for step, batch in enumerate(Feed(spec, world, (0, 0), schedule.total_steps)):
        loss = task.losses(model, batch, step)["loss"]
        loss.backward()
        if config.engine.clip_grad:
            nn.utils.clip_grad_norm_(module.parameters(), config.engine.clip_grad)
        for group in optimiser.param_groups:
            group["lr"] = schedule.lr(step) * group["lr_scale"]
        optimiser.step()
        optimiser.zero_grad()
        losses.append(distributed.all_reduce_sum(loss.detach().double()).item() / world.world_size)
    return {"losses": losses}


def attempt(world: distributed.World) -> str:
    """The same on all ranks; another in every (re)start."""
    return distributed.broadcast_object(uuid.uuid4().hex[:8])


def committed(out: str) -> list[int]:
    """Steps whose manifest is there and lists nothing that is absent or differs, oldest first."""
    steps = checkpoint_steps(out)
    for step in steps:
        for info in storage.read_json(manifest_uri(out, step))["files"]:
            digest = storage.sha256_bytes(storage.read_bytes(storage.join(out, info["path"])))
            assert digest == info["sha256"], f"step {step} was committed, but {info['path']} is not whole"
    return steps


def train(spec: dict, world: distributed.World) -> dict:
    config = LoopConfig.parse(spec["loop"] | (spec.get("other_loop", {}) if world.rank else {}))
    if spec.get("mode") == "ddp":
        return plain_ddp(spec, world, config)
    if "kills" in spec and world.rank == 0:
        spec["committed"] = committed(spec["out"])
    task = ToyTask(spec, world)
    steps_per_epoch, make_feed, data = open_feed(spec, world, config)
    trainer = Trainer(
        task=task, config=config, world=world, steps_per_epoch=steps_per_epoch, make_feed=make_feed,
        out=spec["out"], attempt=f"{attempt(world)}{spec.get('name', '')}", identity=config.identity(),
        data_fingerprint=data,
    )  # fmt: skip
    task.trainer = trainer
    digest = loop.source_digest
    if "code" in spec:
        loop.source_digest = lambda: spec["code"][world.rank]
    try:
        result = trainer.train()
    finally:
        loop.source_digest = digest
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result["partition"], result["statistics"] = task.partition, task.statistics
    texts = [
        storage.read_bytes(storage.join(spec["out"], part["path"])).decode() for part in result["metrics"]
    ]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    result["losses"] = [line["loss"] for line in lines if "loss" in line]
    result["events"] = [line for line in lines if "event" in line]
    return result


def same_arithmetic() -> None:
    """Equal results on every machine, for as far as torch can be told."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # its kernels differ from one CPU to the next
    torch.use_deterministic_algorithms(True)


def main() -> int:
    """Run one spec, or a list of them one after the other; the results (or errors) go to the files they name."""
    specs = json.loads(Path(sys.argv[1]).read_text())
    same_arithmetic()
    code = 0
    try:
        for spec in specs if isinstance(specs, list) else [specs]:
            if spec.get("fake_fp16"):
                from deepspeed.accelerator import get_accelerator

                get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but it works
            world = distributed.init(timeout_s=spec.get("timeout_s", 60), use_gpu=False)
            if "kills" in spec:
                killer.install(spec, world.rank)
            try:
                result, code = train(spec, world), 0
            except ItpnError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                result, code = {"error": type(error).__name__, "message": str(error)}, error.exit_code
            if "result" in spec:
                Path(f"{spec['result']}.{world.rank}").write_text(json.dumps(result))
    finally:
        distributed.shutdown()
    return code


if __name__ == "__main__":
    distributed.leave(main())
