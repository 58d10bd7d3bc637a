"""Cost of the training loop: `python bench/train.py [--quick] [--threads N] [--clock wall|cpu]`.

Prints what it does and, last, one JSON object:
- overhead_over_bare_loop: extra time of a step of the loop (DeepSpeed, guards, metrics) over a bare
  forward-backward-AdamW step of the same model, data, teacher and masks. Both run in turns in one process.
- save_stall_share: time that the loop stands still for a save, over the time between two saves at the default
  interval (one epoch of clipart-12).
- images_per_s, data_wait_share, step_ms, bare_step_ms, save_stall_ms.
- state_bytes_zero0…3 and theory_bytes_zero0…3: weights, gradients and AdamW state on one of two ranks at the
  optimiser step, counted from the tensors, beside the formula of docs/scaling.md. Not with --quick.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cluster import distributed
from cluster.distributed import World
from stages.data.feed import Batch
from stages.model import MaskedFeatureModel, load_teacher
from stages.pretrain.config import PretrainConfig
from stages.pretrain.task import MfmTask
from stages.train.loop import Trainer

ROOT = Path(__file__).resolve().parents[1]
EPOCH_STEPS = 27  # clipart-12's 1751 training images at a batch of 64


class Synthetic:
    """A feed of random images that are there already: the loop's own cost, without decoding."""

    def __init__(self, rank_batch: int, size: int, on_batch: Callable[[], None], steps: int) -> None:
        self.wait_s = 0.0
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(
            0, 256, (rank_batch, size, size, 3), generator=generator, dtype=torch.uint8
        )
        self._on_batch, self._steps = on_batch, steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._steps):
            self._on_batch()
            ids = torch.arange(len(self._images))
            yield Batch(self._images, ids % 12, ids + step * len(ids), 0, step, 0)

    def close(self) -> None:
        pass


def config(batch: int, steps: int, save_every: int, zero_stage: int = 1) -> PretrainConfig:
    return PretrainConfig.parse(
        {
            "backbone": "fast_itpn_micro",
            "objective": {"fpn_dim": 64},
            "teacher": {"uri": str(ROOT / "assets" / "clip-micro")},
            "data": {"view": {"size": 96}},
            "global_batch": batch,
            "schedule": {"steps": steps, "warmup_steps": 2},
            "engine": {"zero_stage": zero_stage, "zero3_persist_numel": 0},
            "checkpoint": {"save_every_steps": save_every},
        }
    )


def bare_step(task: MfmTask, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    loss = task.losses(task.module, batch, 0)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(task.module.parameters(), 3.0)
    optimiser.step()
    optimiser.zero_grad()


def loop_cost(batch: int, steps: int, clock: Callable[[], float], out: str) -> dict[str, float]:
    """Steps of the loop and of a bare loop in turns: what the machine does meanwhile hits both alike."""
    world = distributed.init(use_gpu=False)
    settings = config(batch, steps, save_every=max(steps // 3, 1))
    teacher = load_teacher(settings.teacher, world.device)
    tasks = []
    for _ in range(2):
        torch.manual_seed(0)
        module = MaskedFeatureModel(settings.backbone, settings.objective, teacher.dim)
        tasks.append(MfmTask(settings, module, teacher, world.device))
    optimiser = torch.optim.AdamW(tasks[1].module.parameters(), lr=1e-3, fused=True)
    own: list[float] = []
    bare: list[float] = []
    marks: list[float] = []
    stalls: list[float] = []

    def between() -> None:
        now = clock()
        stalls.append(trainer.checkpoints.stalled_s)
        if marks:
            own.append(now - marks[-1])
        sample = next(iter(Synthetic(batch, 96, lambda: None, 1)))
        began = clock()
        bare_step(tasks[1], optimiser, sample)
        bare.append(clock() - began)
        marks.append(clock())

    trainer = Trainer(
        task=tasks[0],
        config=settings,
        world=world,
        make_feed=lambda start, end: Synthetic(batch, 96, between, end),
        steps_per_epoch=EPOCH_STEPS,
        out=out,
        attempt="bench",
        identity={},
        data_fingerprint="synthetic",
    )
    trainer.train()
    distributed.shutdown()
    step, bare_s = statistics.median(own[2:]), statistics.median(bare[3:])
    stall = (
        stalls[-1] / 2
    )  # two saves in mid-run; the last one, which is waited for to its end, is not counted
    return {
        "overhead_over_bare_loop": step / bare_s - 1,
        "step_ms": 1e3 * step,
        "bare_step_ms": 1e3 * bare_s,
        "images_per_s": batch / step,
        "data_wait_share": 0.0,
        "save_stall_ms": 1e3 * stall,
        "save_stall_share": stall / (EPOCH_STEPS * step),
    }


def state_bytes(stage: int, world: World, out: str) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW state that this rank holds when the optimiser steps."""
    settings = config(8, 2, 100, stage)
    teacher = load_teacher(settings.teacher, "cpu")
    torch.manual_seed(0)
    module = MaskedFeatureModel(settings.backbone, settings.objective, teacher.dim)
    numel = sum(p.numel() for p in module.parameters())
    found: dict[str, int] = {}

    class Watched(MfmTask):
        def losses(self, model: Any, batch: Any, step: int) -> dict[str, torch.Tensor]:
            engine = trainer.engine
            optimiser, step_now = engine.optimiser, engine.optimiser.step

            def watched(closure: Any = None) -> Any:
                masters = {id(p): p for g in optimiser.param_groups for p in g["params"]}
                grads = sum(p.grad.numel() for p in masters.values() if p.grad is not None)
                grads = max(grads, found.get("gradients", 0))
                found.update(gradients=grads)
                return step_now(closure)

            optimiser.step = watched  # type: ignore[method-assign]
            found["weights"] = sum(p.data.numel() for p in self.module.parameters())
            found["adam"] = sum(t.numel() for s in optimiser.state.values() for t in s.values() if t.dim())
            found["masters"] = sum(f.numel for f in engine.fragments) if stage else 0
            return super().losses(model, batch, step)

    trainer = Trainer(
        task=Watched(settings, module, teacher, "cpu"),
        config=settings,
        world=world,
        make_feed=lambda start, end: Synthetic(8 // world.world_size, 96, lambda: None, end),
        steps_per_epoch=100,
        out=out,
        attempt="bench",
        identity={},
        data_fingerprint="synthetic",
    )
    trainer.train()
    total = 4 * (found["weights"] + found["masters"] + found["adam"])
    R = world.world_size
    weights, rest = (numel / R if stage == 3 else numel), (numel / R if stage else numel)
    theory = 4 * (weights + (rest if stage else 0) + 2 * rest)
    return {f"state_bytes_zero{stage}": total, f"theory_bytes_zero{stage}": int(theory)}


def memory() -> dict[str, int]:
    """`state_bytes` of every stage, from two processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", str(distributed.free_port()), __file__, "--memory-rank", folder]
        subprocess.run(
            command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        )
        return json.loads((Path(folder) / "memory.json").read_text())


def memory_rank(folder: str) -> None:
    world = distributed.init(use_gpu=False)
    found: dict[str, int] = {}
    for stage in range(4):
        found |= state_bytes(stage, world, f"{folder}/{stage}")
    if world.rank == 0:
        (Path(folder) / "memory.json").write_text(json.dumps(found))
    distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a shared machine")
    parser.add_argument("--memory-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_rank:
        memory_rank(arguments.memory_rank)
        return
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    batch, steps = 32, 18 if arguments.quick else 60
    print(f"loop against bare loop: fast_itpn_micro, batch {batch}, {steps} steps, {arguments.clock} clock")
    with tempfile.TemporaryDirectory() as out:
        found: dict[str, float] = loop_cost(batch, steps, clock, out)
    if not arguments.quick:
        print("state per ZeRO stage: two processes")
        found |= memory()
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))


if __name__ == "__main__":
    main()
