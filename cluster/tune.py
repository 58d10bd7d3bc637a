"""Ray Tune's ASHA as a judge of running trials; beside cluster/jobs/ the only importer of ray.

The trials are ordinary steps that the runner starts, packs, retries and resumes; what is Ray Tune's is the decision
which of them go on: asynchronous successive halving (Li et al., 2018, arXiv:1810.05934).
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast


class Asha:
    """Judges trials at rungs first_rung · reduction^k of their length; lower values are better.

    Args:
        first_rung: share of a trial's length (0 to 1) after which it may first be stopped.
        reduction: at each rung about 1/reduction of the trials go on.
    """

    def __init__(self, first_rung: float, reduction: float) -> None:
        from ray.tune.schedulers import ASHAScheduler

        # Percent, since Ray Tune counts in whole units from 1.
        self._scheduler = ASHAScheduler(
            time_attr="percent",
            metric="value",
            mode="min",
            grace_period=cast(Any, 100 * first_rung),  # its annotation says int; any number will do
            max_t=100,
            reduction_factor=reduction,
        )
        self._trials: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.rungs = rungs(first_rung, reduction)

    def hopeless(self, trial: str, rung: float, value: float) -> bool:
        """Tell what a trial has come to at a rung (a share below 1); True when it should stop there."""
        with self._lock:
            if trial not in self._trials:
                self._trials[trial] = SimpleNamespace(trial_id=trial)
                self._scheduler.on_trial_add(cast(Any, None), self._trials[trial])
            told = {"percent": 100 * rung, "value": value}
            return (
                self._scheduler.on_trial_result(cast(Any, None), self._trials[trial], told)
                == self._scheduler.STOP
            )


def rungs(first_rung: float, reduction: float) -> list[float]:
    """The shares of a trial's length at which it is judged."""
    found, rung = [], first_rung
    while rung < 1:
        found.append(rung)
        rung *= reduction
    return found
