"""The training loop, one for pre-training and fine-tuning: a task turns a batch into losses, all else is here.

A step is one global batch. `step` counts batches consumed, applied or not: it is the cursor in the data and the
position in the schedule, and it only goes up, also over a roll-back (which skips the data it came from).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster import distributed, storage
from cluster.distributed import World
from cluster.errors import ConfigError, Stopped, TrainingDiverged
from stages.config import nearest
from stages.data.device import on_device
from stages.data.feed import too_many_bad
from stages.train import state
from stages.train.checkpoint import Checkpoints, is_due
from stages.train.config import LoopConfig
from stages.train.engine import Engine
from stages.train.guards import Guard
from stages.train.launch import source_digest
from stages.train.metrics import Clock, Smoothed, Speed, require_tensorboard
from stages.train.mfu import peak_flops
from stages.train.optim import parameter_groups
from stages.train.schedule import Schedule, make_schedule
from stages.train.task import Feed, MakeFeed, Task
from stages.train.watch import Watch

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """One run: build it and call `train`. All ranks do the same.

    Args:
        task, config: what and how.
        make_feed: opens the data at a cursor.
        steps_per_epoch: of the sample order.
        out, attempt: where state is kept (see stages/train/checkpoint.py), and the id of this try.
        identity: identity of the whole stage config, for drift; `data_fingerprint` and the code must
            be equal on all ranks.
        layer_of, layers: for layer decay (stages/train/optim.py).
        flops_per_image: of a training step, the teacher's among them, for one image; without it no MFU is told.
    """

    task: Task
    config: LoopConfig
    world: World
    make_feed: MakeFeed
    steps_per_epoch: int
    out: str
    attempt: str
    identity: dict[str, Any]
    data_fingerprint: str
    code_version: str = "unknown"
    layer_of: Callable[[str], int] | None = None
    layers: int = 0
    flops_per_image: float | None = None
    step: int = 0
    replaced: int = 0
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)  # sample id -> (key, reason), of all ranks
    notes: list[str] = field(default_factory=list)
    _have_checkpoint: bool = False
    _save_owed: bool = False  # one is due and not begun
    _heads: list[str] = field(default_factory=list)
    _events: list[dict[str, Any]] = field(default_factory=list)  # of the tries before

    def train(self) -> dict[str, Any]:
        """Train from the newest checkpoint, or the start, to the end of the schedule; returns a JSON-ready summary.

        Raises Stopped after a requested stop (the state is saved), TrainingDiverged when the guard gives up.
        """
        world, config = self.world, self.config
        for name, value in (
            ("the code", source_digest()),
            ("the config", storage.sha256_bytes(storage.canonical_json(self.identity))),
            ("the settings", storage.sha256_bytes(storage.canonical_json(config.model_dump(mode="json")))),
            ("the data", self.data_fingerprint),
        ):
            distributed.assert_same_on_all_ranks(name, value)
        if config.global_batch % world.world_size:
            raise ConfigError(
                f"global_batch {config.global_batch} cannot be split evenly",
                expected="a multiple of the number of ranks",
                found=f"{world.world_size} ranks",
                remedy="change the number of ranks; the batch is part of the run's identity",
            )
        if config.watch.tensorboard:  # only rank 0 needs it, but all must stop for the want of it
            require_tensorboard()
        self.schedule: Schedule = make_schedule(config.schedule, config.optimiser.lr, self.steps_per_epoch)
        self.guard, self.smoothed = Guard(config.guard), Smoothed()
        with ExitStack() as stack:
            stack.enter_context(distributed.StopOnSignal())
            shapes = {n: p.shape for n, p in self.task.module.named_parameters() if p.requires_grad}
            self.engine = Engine.build(
                self.task.module,
                parameter_groups(
                    self.task.module, config.optimiser, layer_of=self.layer_of, layers=self.layers
                ),
                config=config.engine,
                optimiser=config.optimiser,
                world=world,
                rank_batch=config.global_batch // world.world_size,
                ema_decay=config.ema_decay,
            )
            stack.callback(self.engine.close)
            self.checkpoints = Checkpoints(self.out, self.attempt, world, config.checkpoint, self.identity)
            stack.callback(self.checkpoints.close)
            self._seed_generators()
            self._resume()
            peak = peak_flops(config.engine, world)
            self.speed = Speed(config.global_batch, self.flops_per_image, peak)
            self.watch = self._open_watch()
            if self.watch:
                stack.callback(self.watch.close)
            began, first = time.monotonic(), self.step
            if self.step < self.schedule.total_steps:
                self._steps()
            seconds = time.monotonic() - began
            whole = self.speed.of(self.step - first, seconds, 0.0)
            return {
                "step": self.step,
                "optimiser_steps": self.engine.optimiser_steps(),
                "rollbacks": self.guard.rollbacks,
                "replaced": self.replaced,
                "notes": self.notes,
                "metrics": self.checkpoints.segments,
                "images_per_s": whole["images_per_s"],
                "mfu": whole.get("mfu"),
                "seconds": seconds,
                "loss": self.guard.recent[-1] if self.guard.recent else None,
                "stalled_s": self.checkpoints.stalled_s,
                "shapes": {name: list(shape) for name, shape in shapes.items()},
            }

    def summary(self, result: dict[str, Any]) -> dict[str, Any]:
        """The parts of `train`'s result that a stage's Outcome takes."""
        notes = list(result["notes"])
        if result["replaced"]:
            notes.append(f"{result['replaced']} samples could not be decoded and gave way to others")
        headline = {"images_per_s": result["images_per_s"], "train_seconds": result["seconds"]}
        if result["mfu"]:
            headline["mfu"] = result["mfu"]
        if result["loss"] is not None:
            headline["train_loss"] = result["loss"]
        return {"optimiser_steps": result["optimiser_steps"], "notes": notes, "headline": headline}

    def _steps(self) -> None:
        feed = self.make_feed(divmod(self.step, self.steps_per_epoch), self.schedule.total_steps)
        clock, self._saved_at, self._step_s = Clock(), time.monotonic(), 0.0
        try:
            for batch in on_device(feed, self.world.device):
                stop = self._one_step(batch, feed, clock)
                if stop:
                    raise Stopped(
                        f"training stopped on request after step {self.step} of {self.schedule.total_steps}",
                        remedy="run it again: it goes on from there",
                    )
        except TrainingDiverged:  # on all ranks at once; the events must outlive the run
            self.checkpoints.drain()
            if self.watch:
                for path, local in self.watch.cut(f"{self.step:09d}-{self.attempt}-diverged").items():
                    storage.upload_file(local, storage.join(self.out, path))
            raise
        finally:
            feed.close()
        self.checkpoints.drain()

    def _one_step(self, batch: Any, feed: Feed, clock: Clock) -> bool:
        """Take one step and what belongs to its end; returns whether all ranks agreed to stop."""
        engine, lr = self.engine, self.schedule.lr(self.step)
        sums: dict[str, Tensor] = {}
        parts = engine.accumulation
        for index, piece in enumerate(batch.split(parts)):
            losses = self.task.losses(engine.model, piece, self.step)
            engine.backward(losses["loss"])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() / parts
            if index < parts - 1:
                engine.micro_step_done()
        facts, means = self._agree(sums, batch)
        reason = self.guard.judge_loss(means["loss"], int(facts["bad_ranks"]))
        result = engine.step(lr, skip=reason is not None)
        if reason is None and not result.applied and not result.overflow:
            reason = "gradient not finite"
        self.step += 1
        if facts["replaced"]:
            self.replaced += int(facts["replaced"])
            bad = [entry for part in distributed.gather_objects(batch.bad) for entry in part]
            self._event("samples replaced", samples=[f"{key}: {why}" for _, key, why in bad])
            self.bad |= {sample_id: (key, why) for sample_id, key, why in bad}
            if len(self.bad) > feed.bad_limit:  # alike on all ranks
                raise too_many_bad(self.bad, feed.bad_limit)
        too_many = self.guard.judge_overflow(result.overflow, result.at_bottom)
        if result.overflow and too_many is None:
            self._event("fp16 overflow: loss scale lowered", loss_scale=engine.scalars().get("cur_scale"))
        else:
            self._judge(means["loss"], reason or too_many)
        lap = clock.lap(feed.wait_s)
        self._step_s = lap[0]
        if result.applied:
            self.smoothed.add(means)
        if self.watch:
            self.watch.step(self.step, means, lap, applied=result.applied, lr=lr, grad_norm=result.grad_norm)
        every = self.config.watch.picture_every_steps
        if every and self.step % every == 0:
            self._picture(batch)
        stop = facts["stop"] > 0
        self._save_if_due(stop, facts)
        return stop and self.step < self.schedule.total_steps

    def _agree(self, sums: dict[str, Tensor], batch: Any) -> tuple[dict[str, float], dict[str, float]]:
        """One small all-reduce per step: mean losses, and everything the ranks must decide alike."""
        if not self._heads:
            self._heads = sorted(sums)
            self._check_best_by()
        minutes = self.config.checkpoint.save_every_minutes
        mine = {
            "bad_ranks": float(not bool(torch.isfinite(sums["loss"]))),
            "stop": float(distributed.stop_requested()),
            "save": float(bool(minutes) and self._seconds_are_due(60 * (minutes or 0))),
            "uploaded": float(self.checkpoints.uploaded()),
            "failed": float(self.checkpoints.failed()),
            "replaced": float(batch.replaced),
        }
        head = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.world.device)
        losses = torch.stack([sums[name].to(head) for name in self._heads])
        total = distributed.all_reduce_sum(torch.cat([head, losses])).tolist()
        facts = dict(zip(mine, total, strict=False))
        means = [value / self.world.world_size for value in total[len(mine) :]]
        return facts, dict(zip(self._heads, means, strict=True))

    def _check_best_by(self) -> None:
        config = self.config.checkpoint
        if config.keep_best and config.best_by not in self._heads:
            raise ConfigError(
                f"checkpoint.best_by: there is no loss '{config.best_by}'",
                expected=", ".join(self._heads),
                found=config.best_by,
                remedy=nearest(config.best_by, self._heads),
            )

    def _judge(self, loss: float, reason: str | None) -> None:
        if reason is not None:
            self._event("step not applied", reason=reason)
        verdict = self.guard.judge_step(loss, reason, step=self.step, has_checkpoint=self._have_checkpoint)
        if verdict == "roll back":
            self.checkpoints.drain()
            manifest = self.checkpoints.restore_newest(self._fill, self._activate_elsewhere)
            assert manifest is not None, "a checkpoint was committed"
            # What describes the weights goes back with them; what counts data, events and time goes on.
            self.guard.roll_back(manifest["guard"])
            self.smoothed = Smoothed(**manifest["smoothed"])
            note = (
                f"rolled back to the weights of step {manifest['step']}; data up to step {self.step} skipped"
            )
            self._event("rolled back", to=manifest["step"], reason=reason)
            self.notes.append(note)
            log.warning("%s (%s)", note, reason)

    def _save_if_due(self, stop: bool, facts: dict[str, float]) -> None:
        points, config = self.checkpoints, self.config.checkpoint
        if facts["failed"] or (points.in_flight and facts["uploaded"] == self.world.world_size):
            points.drain() if facts["failed"] else points.finish()
        every = config.save_every_steps or (None if config.save_every_minutes else self.steps_per_epoch)
        last = self.step == self.schedule.total_steps
        due = facts["save"] or (every and is_due(self.step, every, config.background))
        self._save_owed = bool(due) or self._save_owed
        # Inside a row of bad steps it waits for the end: a roll-back must not come to the weights that it flees from.
        if not (stop or last or (self._save_owed and not self.guard.bad_in_row)):
            return
        self._save_owed = False
        points.drain()  # the one before is committed before this one begins: see CheckpointConfig
        began = time.monotonic()
        files = state.snapshot(self.engine)
        header = {
            "epoch": self.step // self.steps_per_epoch,
            "step_in_epoch": self.step % self.steps_per_epoch,
            "zero_stage": self.config.engine.zero_stage,
            "code_version": self.code_version,
            "scalars": self.engine.scalars(),
            "guard": self.guard.state(),
            "replaced": self.replaced,
            "bad": [[sample_id, *facts] for sample_id, facts in self.bad.items()],
            "notes": list(self.notes),
            "smoothed": {"weight": self.smoothed.weight, "sums": self.smoothed.sums},
            "means": self.smoothed.means(),
            "events": list(self.watch.events) if self.watch else [],
        }
        extra = self.watch.cut(f"{self.step:09d}-{self.attempt}") if self.watch else {}
        points.begin(self.step, files, header, extra)
        points.stalled_s += time.monotonic() - began
        self._have_checkpoint = True
        self._saved_at = time.monotonic()
        if stop or last or every == 1 or not config.background:
            points.drain()

    def _seconds_are_due(self, interval_s: float) -> bool:
        """Whether a save must begin now, since a step that takes as long as the last one would end too late."""
        until_next = interval_s / 2 if self.config.checkpoint.background else interval_s
        return time.monotonic() - self._saved_at + self._step_s > until_next

    def _resume(self) -> None:
        manifest = self.checkpoints.restore_newest(self._fill, self._activate)
        if manifest is None:
            return
        self.step, self._have_checkpoint = manifest["step"], True
        self.guard.load(manifest["guard"])
        self.replaced, self.notes = manifest["replaced"], list(manifest["notes"])
        self.bad = {sample_id: (key, why) for sample_id, key, why in manifest.get("bad", ())}
        self.smoothed, self._events = Smoothed(**manifest["smoothed"]), manifest["events"]
        self.checkpoints.segments = list(manifest["metrics"])
        log.info("resuming at step %d", self.step)

    def _fill(self, manifest: dict[str, Any], open_file: Callable[[str], Path]) -> None:
        state.fill(self.engine, _names(manifest), open_file)

    def _activate(self, manifest: dict[str, Any], open_file: Callable[[str], Path]) -> None:
        if not state.activate(self.engine, _names(manifest), open_file, manifest["scalars"]):
            self._seed_generators(manifest["step"])

    def _activate_elsewhere(self, manifest: dict[str, Any], open_file: Callable[[str], Path]) -> None:
        state.activate(self.engine, _names(manifest), open_file, manifest["scalars"])
        self._seed_generators(self.step)  # other random numbers than those that led here

    def _seed_generators(self, step: int = 0) -> None:
        seed = int.from_bytes(
            bytes.fromhex(storage.sha256_bytes(f"{self.config.seed}/{self.world.rank}/{step}".encode())[:8]),
            "big",
        )
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def _open_watch(self) -> Watch | None:
        if self.world.rank != 0:
            return None
        config = self.config
        return Watch(
            config,
            out=self.out,
            attempt=self.attempt,
            start=self.step,
            total=self.schedule.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            speed=self.speed,
            device=self.world.device,
            events=self._events,
        )

    def _event(self, event: str, **facts: Any) -> None:
        if self.watch:
            self.watch.event(event, self.step, **facts)

    def _picture(self, batch: Any) -> None:
        """On all ranks: ZeRO-3 gathers weights on the way. Leaves no trace in the run: pictures are no identity."""
        module = self.task.module
        devices = [self.world.device] if self.world.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):
            module.eval()
            try:
                image = self.task.picture(self.engine.model, batch)
            finally:
                module.train()
        if image is not None and self.watch:
            self.watch.picture(self.step, image)


def _names(manifest: dict[str, Any]) -> list[str]:
    return [info["path"].rsplit("/", 1)[1] for info in manifest["files"]]
