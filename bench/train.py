"""Cost of the training loop: `python bench/train.py [--quick] [--threads N] [--clock wall|cpu]`.

Prints what it does and, last, one JSON object:
- overhead_over_bare_loop: extra time of a step of the loop (DeepSpeed, guards, metrics) over a bare
  forward-backward-AdamW step of the same model, data, teacher and masks. Both run in turns in one process.
- save_stall_share: time that the loop stands still for a save, over the time between two saves at the default
  interval (one epoch, so half an epoch). Both by the wall clock, whatever --clock says: waiting takes no CPU time.
- step_ms, bare_step_ms, save_stall_ms, and images_per_s and data_wait_share of training on shards of clipart-12.
- peak_mib_<precision>_zero<stage> and theory_mib_…: most bytes of tensors that one of two ranks held in the third and
  fourth step (torch's profiler counts them; the teacher apart), beside the state of bench/scaling.py. The difference is
  activations and buckets.
  Not with --quick.
- on a GPU mfu: of L at 256 pixels with a teacher of CLIP ViT-L/14's shape, which is then the model of the figures above
  too; on a CPU it is fast_itpn_micro with clip-micro.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scaling import IMAGES, clip_large_teacher, state_bytes, step_buffer_bytes

from cluster import distributed
from cluster.distributed import World
from stages.artifacts import DatasetRef
from stages.context import StageContext
from stages.data.batch import Batch
from stages.model import MaskedFeatureModel, Teacher, load_teacher
from stages.model.flops import pretrain_flops, teacher_flops
from stages.pretrain.config import PretrainConfig
from stages.pretrain.task import MfmTask
from stages.shard.config import ShardConfig
from stages.shard.stage import run as shard
from stages.train.checkpoint import is_due
from stages.train.feeds import open_training_data
from stages.train.loop import Trainer

ROOT = Path(__file__).resolve().parents[1]
MICRO = {"backbone": "fast_itpn_micro", "data": {"view": {"size": 96, "min_scale": 0.35}, "streams": 8}}
LARGE = {
    "backbone": {"size": "fast_itpn_large", "img_size": 256},
    "data": {"view": {"size": 256}},
    "teacher": {"uri": "", "input_size": 224},
    "objective": {},
}


@dataclass(frozen=True)
class Subject:
    """What is trained: by default the demo's model on the CPU; on a GPU the large recipe's."""

    gpu: bool
    batch: int
    epoch_steps: int  # the default save interval: most that is lost, a save begins twice in it

    def config(self, steps: int, **changes: Any) -> PretrainConfig:
        values = {
            "objective": {"fpn_dim": 64},
            "teacher": {"uri": str(ROOT / "assets" / "clip-micro")},
            **(LARGE if self.gpu else MICRO),
            "global_batch": self.batch,
            "schedule": {"steps": steps, "warmup_steps": 2},
            "engine": {"precision": "bf16", "compile": True} if self.gpu else {},
        }
        return PretrainConfig.parse(values | changes)

    def teacher(self, config: PretrainConfig, device: str) -> Teacher:
        return (
            clip_large_teacher(config.teacher, device) if self.gpu else load_teacher(config.teacher, device)
        )


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


def make_task(config: PretrainConfig, teacher: Teacher, device: str) -> MfmTask:
    torch.manual_seed(0)
    return MfmTask(
        config, MaskedFeatureModel(config.backbone, config.objective, teacher.dim), teacher, device
    )


def make_trainer(task: MfmTask, world: World, out: str, make_feed: Any, steps_per_epoch: int) -> Trainer:
    config, teacher = task.config, task.teacher
    student = pretrain_flops(config.backbone, config.objective, teacher.dim)
    return Trainer(
        task=task,
        config=config,
        world=world,
        make_feed=make_feed,
        steps_per_epoch=steps_per_epoch,
        out=out,
        attempt="bench",
        identity={},
        data_fingerprint="bench",
        flops_per_image=3 * student + teacher_flops(teacher),
    )


def bare_step(task: MfmTask, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    loss = task.losses(task.module, batch, 0)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(task.module.parameters(), 3.0)
    optimiser.step()
    optimiser.zero_grad()
    if task.device != "cpu":
        torch.cuda.synchronize()


def loop_cost(subject: Subject, steps: int, clock: Callable[[], float], out: str) -> dict[str, float]:
    """Steps of the loop and of a bare loop in turns: what the machine does meanwhile hits both alike."""
    world = distributed.init()
    every = max(steps // 3, 2)
    settings = subject.config(steps, checkpoint={"save_every_steps": every})
    teacher = subject.teacher(settings, world.device)
    task, other = (make_task(settings, teacher, world.device) for _ in range(2))
    other.module.to(world.device, torch.bfloat16 if subject.gpu else torch.float32)
    if subject.gpu:
        other.module.compile()
    optimiser = torch.optim.AdamW(other.module.parameters(), lr=1e-3, fused=True)
    own: list[float] = []
    bare: list[float] = []
    marks: list[float] = []
    walls: list[float] = []  # of steps of the loop, as `own`, by the wall clock
    wall_marks: list[float] = []
    stalls: list[float] = []
    size = settings.backbone.img_size

    def between() -> None:
        now, wall = clock(), time.perf_counter()
        stalls.append(trainer.checkpoints.stalled_s)
        if marks:
            own.append(now - marks[-1])
            walls.append(wall - wall_marks[-1])
        sample = next(iter(Synthetic(subject.batch, size, lambda: None, 1)))
        began = clock()
        bare_step(other, optimiser, sample)
        bare.append(clock() - began)
        wall_marks.append(time.perf_counter())
        marks.append(clock())

    def feed(start: tuple[int, int], end: int) -> Synthetic:
        return Synthetic(subject.batch, size, between, end)

    trainer = make_trainer(task, world, out, feed, subject.epoch_steps)
    trainer.train()
    distributed.shutdown()
    step, bare_s = statistics.median(own[2:]), statistics.median(bare[3:])
    # Those in mid-run; the last one, which is waited for to its end, is not counted.
    stall = stalls[-1] / sum(is_due(step, every, background=True) for step in range(1, steps))
    return {
        "overhead_over_bare_loop": step / bare_s - 1,
        "step_ms": 1e3 * step,
        "bare_step_ms": 1e3 * bare_s,
        "save_stall_ms": 1e3 * stall,
        "save_stall_share": stall / (subject.epoch_steps / 2 * statistics.median(walls[2:])),
    }


def told(trainer: Trainer, out: str) -> dict[str, float]:
    """Train, and give the medians of what the metrics file says of the second half of the steps."""
    result = trainer.train()
    texts = [(Path(out) / part["path"]).read_text() for part in result["metrics"]]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    half = [line for line in lines if "loss" in line][len(lines) // 2 :]
    names = ("images_per_s", "data_wait_share", "mfu")
    return {n: statistics.median(line[n] for line in half) for n in names if n in half[0]}


def fed(steps: int, folder: str) -> dict[str, float]:
    """Training on real shards: images/s, and the share of time that the loop waits for them."""
    source = ShardConfig(name="clipart-12", source=str(ROOT / "assets" / "clipart-12.tar"), shard_samples=256)
    data = shard(source, {}, StageContext(out=f"{folder}/shards")).artifact
    assert isinstance(data, DatasetRef)
    world = distributed.init(use_gpu=False)
    config = Subject(False, 32, 0).config(steps)
    _, order, feed = open_training_data(config, config.data, data.manifest, split="train", world=world)
    task = make_task(config, load_teacher(config.teacher, "cpu"), "cpu")
    out = f"{folder}/fed"
    found = told(make_trainer(task, world, out, feed, order.steps_per_epoch), out)
    distributed.shutdown()
    return found


def mfu(subject: Subject, steps: int, out: str) -> dict[str, float]:
    """Model FLOP utilisation of the loop alone on this GPU, and images/s."""
    world = distributed.init()
    config = subject.config(steps)
    task = make_task(config, subject.teacher(config, world.device), world.device)

    def feed(start: tuple[int, int], end: int) -> Synthetic:
        return Synthetic(subject.batch, config.backbone.img_size, lambda: None, end)

    found = told(make_trainer(task, world, out, feed, subject.epoch_steps), out)
    distributed.shutdown()
    return {"mfu": found["mfu"], "gpu_images_per_s": found["images_per_s"]}


def memory() -> dict[str, float]:
    """Peak memory of every stage and precision, each from two fresh processes."""
    found: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
                command += ["--master-port", str(distributed.free_port()), __file__]
                command += ["--memory-rank", folder, precision, str(stage)]
                paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
                subprocess.run(
                    command,
                    check=True,
                    env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                )
                result = json.loads((Path(folder) / "memory.json").read_text())
            found |= {f"{name}_mib_{precision}_zero{stage}": value for name, value in result.items()}
            print(
                f"  {precision} ZeRO-{stage}: peak {result['peak']:.0f} MiB, state {result['theory']:.0f} MiB"
            )
    return found


def memory_rank(folder: str, precision: str, stage: int) -> None:
    """One rank of `memory`: a few steps of fast_itpn_tiny on small images, so that its state outweighs all else."""
    world = distributed.init(use_gpu=False)
    engine = {"zero_stage": stage, "precision": precision, "zero3_persist_numel": 0, "bucket_mb": 8.0}
    config = Subject(False, 2 * world.world_size, 0).config(
        5, backbone={"size": "fast_itpn_tiny", "img_size": 96}, engine=engine
    )
    teacher = load_teacher(config.teacher, "cpu")
    marks: list[int] = []  # beginnings of the steps, in the profiler's clock

    class Watched(MfmTask):
        def losses(self, model: Any, batch: Any, step: int) -> dict[str, torch.Tensor]:
            marks.append(time.time_ns())
            return super().losses(model, batch, step)

    def feed(start: tuple[int, int], end: int) -> Synthetic:
        return Synthetic(2, 96, lambda: None, end)

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        torch.manual_seed(0)
        module = MaskedFeatureModel(config.backbone, config.objective, teacher.dim)
        make_trainer(Watched(config, module, teacher, "cpu"), world, f"{folder}/out", feed, 100).train()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    held, peak = 0, 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        # From the third step on, and without the save at the end.
        peak = max(peak, held) if marks[2] <= event.start_ns() < marks[-1] else peak
    state = sum(state_bytes(parameters, world.world_size, stage, precision).values())
    state += step_buffer_bytes(parameters, world.world_size, stage, precision)
    if world.rank == 0:
        result = {"peak": peak / 2**20, "theory": state / 2**20}
        (Path(folder) / "memory.json").write_text(json.dumps(result))
    distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a shared machine")
    parser.add_argument("--memory-rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_rank:
        folder, precision, stage = arguments.memory_rank
        memory_rank(folder, precision, int(stage))
        return
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    gpu, steps = torch.cuda.is_available(), 18 if arguments.quick else 60
    # The default interval, one epoch: of clipart-12 at a batch of 64, of ImageNet-1K at 2048.
    subject = Subject(True, 32, IMAGES // 2048) if gpu else Subject(False, 32, 27)
    name = "fast_itpn_large at 256" if gpu else "fast_itpn_micro"
    print(f"loop against bare loop: {name}, batch {subject.batch}, {steps} steps, {arguments.clock} clock")
    with tempfile.TemporaryDirectory() as out:
        found = loop_cost(subject, steps, clock, f"{out}/loop")
        print(f"training on shards of clipart-12: fast_itpn_micro, batch 32, {steps} steps")
        found |= fed(steps, out)
        if gpu:
            print("MFU")
            found |= mfu(subject, steps, f"{out}/mfu")
    if not arguments.quick:
        print("memory per ZeRO stage: fast_itpn_tiny, two processes on the CPU, one rank's peak")
        found |= memory()
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))


if __name__ == "__main__":
    main()
