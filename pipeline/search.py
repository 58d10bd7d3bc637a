"""Early stopping of hopeless trials, where a recipe asks for it with `search`.

A trial is a step of kind finetune. Whenever one passes a rung, the mean of its training loss over the steps since the
rung before (those that its progress showed, each once) is told to ASHA (Ray Tune's); the worse part is stopped there,
which is an outcome and no failure. What was told lies in
`rungs.json` in each trial's output folder, so a search whose driver was killed goes on where it was: trials that
finished or were stopped are not repeated, and the others are judged against them.

Only losses that mean the same are compared: trials that differ in learning rates, decays, seeds and the like. Where
they differ in what the loss is (label smoothing, mixup, augmentation, drop path, resolution, the data) each group has
an ASHA of its own, and a grid in which no two trials can be compared is refused.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from statistics import mean
from typing import Any, Literal, Protocol, cast

from pydantic import Field

from cluster import storage
from cluster.errors import ConfigError, ItpnError, StorageUnavailable
from cluster.tune import Asha
from pipeline.step import Step
from stages.config import Config

TRIALS = "finetune"  # the kind of the steps that are trials
WRITE_S = 20.0  # how long a rung may take to be written down


class Search(Config):
    """Which trials go on: `--set search.kind=asha`; "off" lets every trial finish.

    Only trials whose training losses mean the same are judged against each other.
    """

    kind: Literal["off", "asha"] = "off"
    first_rung: float = Field(
        default=0.25, gt=0.01, lt=1
    )  # share of its training after which one may be stopped
    reduction: float = Field(default=2.0, gt=1)  # at each rung about 1/reduction go on; rungs grow by it


class StoppedEarly(ItpnError):
    """A trial was stopped because others are better at the same rung."""

    exit_code = 0


class Judge:
    """Follows the trials of one run under `root`."""

    def __init__(self, root: str, search: Search, steps: list[Step]) -> None:
        self._root, self._search = root, search
        trials = [step for step in steps if step.kind == TRIALS]
        _refuse_incomparable(trials)
        self._asha = {
            objective: Asha(search.first_rung, search.reduction) for objective in map(_objective, trials)
        }
        self._losses: dict[str, list[float]] = {}
        self._counted: dict[str, int] = {}  # the last step of each trial whose loss was counted
        self._told: dict[str, list[dict[str, float]]] = {}
        self._lock = threading.Lock()
        earlier = [(rung, step) for step in trials for rung in self._read(step)["rungs"]]
        for rung, trial in sorted(earlier, key=lambda item: item[0]["at"]):
            self._told.setdefault(trial.id, []).append(rung)
            self._asha[_objective(trial)].hopeless(trial.id, rung["rung"], rung["loss"])

    def stopped(self, step: Step) -> str | None:
        """Why the trial was stopped by this search before; None when it was not, or is no trial."""
        return self._read(step)["stopped"] if step.kind == TRIALS else None

    def look(self, step: Step, began: float) -> None:
        """Judge a running trial by its progress, if it has passed a rung; call it every second or so.

        Args:
            began: when this attempt was started (seconds since the epoch); older progress is ignored.

        Raises StoppedEarly when the trial is hopeless.
        """
        if step.kind != TRIALS:
            return
        try:
            progress = storage.read_json(storage.join(step.output(self._root), "progress.json"))
            loss = float(progress["metrics"]["loss"])
            done, share = int(progress["done"]), progress["done"] / progress["total"]
        except (ItpnError, ValueError, KeyError, TypeError, ZeroDivisionError):
            return  # nothing to go by yet
        if progress.get("at", 0) < began:
            return
        asha = self._asha[_objective(step)]
        with self._lock:
            losses, told = self._losses.setdefault(step.id, []), self._told.setdefault(step.id, [])
            if done > self._counted.get(
                step.id, 0
            ):  # a slow step is seen at many looks, and after a restart again
                self._counted[step.id] = done
                losses.append(loss)
            passed = [r for r in asha.rungs if r <= share and all(r > rung["rung"] for rung in told)]
            if not passed or share >= 1 or not losses:
                return
            value = mean(losses)
            losses.clear()
            told.append({"rung": passed[-1], "loss": value, "at": time.time()})
        hopeless = asha.hopeless(step.id, passed[-1], value)
        why = f"stopped early at {passed[-1]:.0%} of its training: loss {value:.4g}, others are better there"
        self._write(step, why if hopeless else None)
        if hopeless:
            raise StoppedEarly(f"'{step.id}' was {why}")

    def _read(self, step: Step) -> dict[str, Any]:
        uri = storage.join(step.output(self._root), "rungs.json")
        found = storage.read_json(uri) if storage.exists(uri) else {}
        # Another search, or another config of the trial: what was found then says nothing now.
        same = (found.get("search"), found.get("fingerprint")) == (self._search.identity(), step.fingerprint)
        return found if same else {"rungs": [], "stopped": None}

    def _write(self, step: Step, stopped: str | None) -> None:
        content = {
            "search": self._search.identity(),
            "fingerprint": step.fingerprint,
            "stopped": stopped,
            "rungs": self._told[step.id],
        }
        uri = storage.join(step.output(self._root), "rungs.json")
        with suppress(StorageUnavailable):  # a search that is resumed judges this trial again
            storage.overwrite(uri, storage.canonical_json(content), deadline_s=WRITE_S)


class _Trial(Protocol):
    """A config of a trial."""

    def objective(self) -> dict[str, Any]:
        """What decides the scale of its training loss."""


def _objective(step: Step) -> str:
    """Equal for trials whose training losses can be compared; where they start from may differ."""
    return storage.canonical_json(_facts(step)).decode()


def _facts(step: Step) -> dict[str, Any]:
    data = {name: needed.fingerprint for name, needed in step.inputs.items() if name != "init"}
    return cast(_Trial, step.config).objective() | {"inputs": data}


def _refuse_incomparable(trials: list[Step]) -> None:
    """Raise ConfigError when there are several trials and no two with one objective: none would ever be stopped."""
    if len(trials) < 2 or len({_objective(trial) for trial in trials}) < len(trials):
        return
    facts = [_facts(trial) for trial in trials]
    differ = sorted({key for other in facts for key in other if other[key] != facts[0].get(key)})
    raise ConfigError(
        "search.kind=asha has nothing to compare: the training loss means something else in every job",
        expected="jobs that differ in what leaves the loss itself alone: lr, weight_decay, layer_decay, epochs, seed",
        found=f"{len(trials)} jobs that differ in {', '.join(differ)}",
        remedy="--set search.kind=off, or more values of grid.lr or grid.seed for each of them",
    )
