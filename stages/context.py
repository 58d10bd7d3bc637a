"""What a stage is given beside its config and inputs."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.executor import Executor, LocalExecutor
from cluster.resources import Resources


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """Where a stage writes and how it gets workers.

    Args:
        out: URI of the step's output folder. Files go to `out/attempts/<attempt>/…`, resumable state
            (training checkpoints, finished shards) to folders of its own under `out`.
        attempt: unique id of this try; keeps a retried write from mixing with a dead one's files.
        executor: how to run more processes.
        resources: what the step may use.
        code_version: version of the code that runs, for lineage.
    """

    out: str
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    executor: Executor = field(default_factory=LocalExecutor)
    resources: Resources = field(default_factory=Resources)
    code_version: str = "unknown"

    @property
    def files(self) -> str:
        """URI prefix for this attempt's files."""
        return storage.join(self.out, "attempts", self.attempt)


class Progress:
    """Publishes how far a stage has come to `out/progress.json`, for the live table and `itpn status`.

    Overwrites one small object at most every `interval_s` seconds; never fails the work it reports on. `facts` are
    further fields of that object (the last events, where pictures lie).
    """

    def __init__(self, out: str, *, total: int, unit: str, start: int = 0, interval_s: float = 1.0) -> None:
        self._uri = storage.join(out, "progress.json")
        self._total, self._unit, self._start = total, unit, start
        self.facts: dict[str, Any] = {}
        self._interval_s = interval_s if "://" not in out or out.startswith("file:") else max(interval_s, 2.0)
        self._began = time.monotonic()
        self._written = 0.0

    def update(self, done: int, *, state: str = "running", force: bool = False, **metrics: float) -> None:
        """Record that `done` of `total` units are finished; `metrics` are shown beside (images_per_s, loss, …)."""
        now = time.monotonic()
        if not force and done < self._total and now - self._written < self._interval_s:
            return
        self._written = now
        speed = (done - self._start) / max(now - self._began, 1e-9)
        payload = {
            "state": state,
            "done": done,
            "total": self._total,
            "unit": self._unit,
            "eta_s": (self._total - done) / speed if speed > 0 else None,
            "metrics": metrics,
            "at": time.time(),
            **self.facts,
        }
        storage.write_telemetry(self._uri, payload)
