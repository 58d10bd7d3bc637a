"""The learning rate of every step: linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.errors import ConfigError
from stages.train.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """`total_steps` and `warmup_steps` fixed; `lr(step)` for steps 0 … total_steps-1.

    Equal to the published `cosine_scheduler`: the warm-up is linspace(warmup_lr, peak, warmup_steps), so that
    its last step and the cosine's first both have the peak.
    """

    peak: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of (0-based) `step`; steps past the end keep the last one's."""
        step = min(step, self.total_steps - 1)
        if step < self.warmup_steps:
            if self.warmup_steps == 1:
                return self.warmup_lr
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / (self.warmup_steps - 1)
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + 0.5 * (self.peak - self.min_lr) * (1 + math.cos(math.pi * done))


def make_schedule(config: ScheduleConfig, peak: float, steps_per_epoch: int) -> Schedule:
    """Turn epochs into steps. Raises ConfigError when nothing or only warm-up would be left."""
    total = config.steps if config.steps is not None else round((config.epochs or 0) * steps_per_epoch)
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    if total < 1 or warmup > total:
        raise ConfigError(
            "the schedule leaves no step to train",
            expected="at least one step, and a warm-up no longer than the whole",
            found=f"{total} steps of which {warmup} warm up ({steps_per_epoch} steps per epoch)",
            remedy="raise epochs or steps, or shorten the warm-up",
        )
    return Schedule(peak, min(config.min_lr, peak), min(config.warmup_lr, peak), warmup, total)
