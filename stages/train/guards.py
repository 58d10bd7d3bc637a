"""What a bad step is, and when to roll back or stop. Pure bookkeeping over numbers that all ranks share.

Every decision is taken from all-reduced values, so that all ranks take the same one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.errors import TrainingDiverged
from stages.train.config import GuardConfig

Verdict = Literal["good", "bad", "roll back"]


@dataclass
class Guard:
    """Watches losses and gradients of one run.

    `judge_loss` is asked before the optimiser step, `judge_step` after it.
    """

    config: GuardConfig
    bad_in_row: int = 0
    rollbacks: int = 0
    overflows: int = 0  # of fp16, in a row
    recent: deque[float] = field(default_factory=deque)  # losses of the last good steps

    def judge_loss(self, loss: float, bad_ranks: int) -> str | None:
        """Why this step must not be applied, from the mean loss and the number of ranks whose loss is not finite."""
        if bad_ranks or not math.isfinite(loss):
            return f"loss not finite on {max(bad_ranks, 1)} rank(s)"
        if self.config.spike_factor and len(self.recent) >= self.config.spike_window:
            median = statistics.median(self.recent)
            if loss > self.config.spike_factor * median:
                return (
                    f"loss {loss:.4g} is over {self.config.spike_factor:g} x the recent median {median:.4g}"
                )
        return None

    def judge_overflow(self, overflow: bool, at_bottom: bool) -> str | None:
        """Why this step is a bad one, from fp16's loss scaling; None for a step that is not, or only lowered the scale.

        Args:
            overflow: whether the step was dropped for a gradient that is not finite.
            at_bottom: whether the loss scale could not be lowered any more.
        """
        self.overflows = self.overflows + 1 if overflow else 0
        if overflow and at_bottom:
            return "gradient not finite at the lowest loss scale of fp16"
        if self.overflows > self.config.max_overflows:
            return (
                f"gradient not finite in {self.overflows} steps in a row, at ever lower loss scales of fp16"
            )
        return None

    def judge_step(self, loss: float, reason: str | None, *, step: int, has_checkpoint: bool) -> Verdict:
        """Count a step; `reason` is None for one that was applied.

        Raises TrainingDiverged when it is time to roll back but the limit is reached or there is nothing to go
        back to.
        """
        if reason is None:
            self.bad_in_row = 0
            self.recent.append(loss)
            if len(self.recent) > self.config.spike_window:
                self.recent.popleft()
            return "good"
        self.bad_in_row += 1
        if self.bad_in_row < self.config.max_bad_steps:
            return "bad"
        if self.rollbacks >= self.config.max_rollbacks or not has_checkpoint:
            back = f"{self.rollbacks} roll-backs" if has_checkpoint else "no checkpoint to go back to"
            raise TrainingDiverged(
                f"training diverged at step {step}",
                expected=f"fewer than {self.config.max_bad_steps} bad steps in a row",
                found=f"{self.bad_in_row}, after {back}; the last: {reason}",
                remedy="lower optimiser.lr, lengthen the warm-up, set engine.clip_grad, or try precision fp32; "
                "the events are in the metrics file",
            )
        self.rollbacks += 1
        return "roll back"

    def state(self) -> dict[str, Any]:
        """JSON-ready, for checkpoints."""
        return {
            "bad_in_row": self.bad_in_row,
            "rollbacks": self.rollbacks,
            "overflows": self.overflows,
            "recent": list(self.recent),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.bad_in_row, self.rollbacks = state["bad_in_row"], state["rollbacks"]
        self.overflows, self.recent = state["overflows"], deque(state["recent"])

    def roll_back(self, state: dict[str, Any]) -> None:
        """Take over the statistics of the checkpoint that was rolled back to.

        Roll-backs are counted over the whole run. The row of bad steps is over, also where the checkpoint was made
        inside it (because the run was stopped there): other data follow.
        """
        self.load(state | {"bad_in_row": 0, "overflows": 0, "rollbacks": self.rollbacks})
