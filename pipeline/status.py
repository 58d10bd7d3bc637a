"""Where a step stands in a run, and the exit code that follows from all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.errors import ItpnError
from pipeline.record import Record
from pipeline.step import Step


class State(StrEnum):
    TODO = "to do"
    WAITING = "waiting"  # for another runner's lease
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"  # asked to, with its state saved
    STOPPED_EARLY = "stopped early"  # a hopeless trial of a search: an outcome, no failure
    BLOCKED = "blocked"  # an input failed
    DRIFTED = "drifted"


@dataclass
class StepStatus:
    """Where one step stands in this run."""

    step: Step
    state: State = State.TODO
    reused: bool = False  # done before this run began
    record: Record | None = None
    error: ItpnError | None = None
    note: str = ""
    blocked_by: str | None = None  # of a blocked step: id of the step that it waits for in vain
    began: float = field(default_factory=time.time)


def exit_code(statuses: list[StepStatus]) -> int:
    """0 when every step is done or was stopped early, else the code of the first failure, else 1 (stopped on request).

    A step whose input was stopped early is not to do either.
    """
    codes = [s.error.exit_code for s in statuses if s.error and s.error.exit_code]
    early = {s.step.id for s in statuses if s.state is State.STOPPED_EARLY}
    fine = [s.state is State.DONE or s.step.id in early or s.blocked_by in early for s in statuses]
    return codes[0] if codes else int(not all(fine))
