"""What rank 0 tells about a run while it trains: metrics files, progress for `itpn status`, gauges, pictures."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import ItpnError
from cluster.jobs import publish_gauges
from stages.context import Progress
from stages.train.config import LoopConfig
from stages.train.layout import METRICS, PICTURES, TENSORBOARD
from stages.train.metrics import MetricsWriter, Speed, TensorBoardWriter, peak_memory_bytes, plain

log = logging.getLogger(__name__)
_EVENTS = 20  # the last ones are shown; the metrics files have all
_GAUGES_EVERY_S = 1.0


class Watch:
    """Everything that is written down about a run. Made on rank 0 only.

    Args:
        out, attempt: where, and the id of this try.
        start, total: steps done when this try began, and at the end.
        speed: gives images/s and MFU from the time of a step.
        device: for its memory.
        events: the last events of the tries before, from the checkpoint.
    """

    def __init__(
        self,
        config: LoopConfig,
        *,
        out: str,
        attempt: str,
        start: int,
        total: int,
        steps_per_epoch: int,
        speed: Speed,
        device: str,
        events: list[dict[str, Any]],
    ) -> None:
        self.events: deque[dict[str, Any]] = deque(events, maxlen=_EVENTS)
        self._config, self._out, self._attempt = config.watch, out, attempt
        self._total, self._epoch, self._speed, self._device = total, steps_per_epoch, speed, device
        self._picture: str | None = None
        local = config.checkpoint.local_dir
        self._tensorboard = TensorBoardWriter(local, start=start) if config.watch.tensorboard else None
        self._writer = MetricsWriter(local)
        self._publisher = _Publisher(out, total=total, start=start, facts=self._facts)

    def step(
        self,
        step: int,
        losses: dict[str, float],
        lap: tuple[float, float],
        *,
        applied: bool,
        **values: float,
    ) -> None:
        """Tell of one step: mean losses, (seconds, seconds waited for data), and more (lr, grad_norm)."""
        figures = values | self._speed.lap(*lap)
        last = step == self._total
        if last or step % self._config.log_every_steps == 0:
            facts = {"memory_bytes": peak_memory_bytes(self._device), "applied": applied}
            epoch = (step - 1) // self._epoch
            self._writer.write({"step": step, "epoch": epoch, **losses, **figures, **facts})
            if self._tensorboard:
                self._tensorboard.scalars(step, losses | figures)
        metrics = {**self._speed.recent(), "epoch": step / self._epoch, **losses}
        self._publisher.tell(step, "done" if last else "running", metrics)

    def event(self, event: str, step: int, **facts: Any) -> None:
        """Tell of something that a person should know."""
        line = {"event": event, "step": step, **facts}
        self._writer.write(line)
        self.events.append({key: plain(value) for key, value in line.items()})

    def picture(self, step: int, image_HWC: Any) -> None:
        """Store a picture (uint8, height x width x 3), in the background."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(image_HWC).save(png, "PNG")
        self._picture = storage.join(self._out, PICTURES, f"{step:09d}-{self._attempt}.png")
        self._publisher.store(self._picture, png.getvalue())
        if self._tensorboard:
            self._tensorboard.picture(step, image_HWC)

    def cut(self, name: str) -> dict[str, Path]:
        """Metrics since the last cut: local files, by their paths below the output folder."""
        files = {f"{METRICS}/{name}.jsonl": self._writer.cut()}
        if self._tensorboard:
            path = self._tensorboard.cut()
            files[f"{TENSORBOARD}/{path.name}"] = path
        return files

    def close(self) -> None:
        """Publish the last state and remove local files."""
        self._publisher.close()
        self._writer.close()
        if self._tensorboard:
            self._tensorboard.close()

    def _facts(self) -> dict[str, Any]:
        return {
            "events": list(self.events),
            "picture": self._picture,
            "tensorboard": storage.join(self._out, TENSORBOARD) if self._tensorboard else None,
        }


class _Publisher:
    """Writes progress, pictures and gauges from a thread of its own: their latency must not stall the loop."""

    def __init__(self, out: str, *, total: int, start: int, facts: Callable[[], dict[str, Any]]) -> None:
        self._progress = Progress(out, total=total, unit="steps", start=start)
        self._facts = facts
        self._tags = {"run": "/".join(out.rstrip("/").split("/")[-3:])}  # kind/name/version
        self._latest: tuple[int, str, dict[str, float]] | None = None
        self._pictures: deque[tuple[str, bytes]] = deque()
        self._wake = threading.Event()
        self._ended = False
        self._gauges_at = 0.0
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def tell(self, done: int, state: str, metrics: dict[str, float]) -> None:
        """Note the newest state; it is published when its turn comes."""
        self._latest = (done, state, metrics)
        self._wake.set()

    def store(self, uri: str, data: bytes) -> None:
        """Write a file; without it the run goes on all the same."""
        self._pictures.append((uri, data))
        self._wake.set()

    def close(self) -> None:
        """Publish the last state and end the thread."""
        self._ended = True
        self._wake.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        ended = False
        while not ended:
            self._wake.wait()
            self._wake.clear()
            ended = self._ended
            latest = self._latest  # read after it: what was told before the end is published
            while self._pictures:
                self._store(*self._pictures.popleft())
            if latest is not None:
                done, state, metrics = latest
                self._progress.facts = self._facts()
                self._progress.update(done, state=state, force=ended, **metrics)
                self._set_gauges(done, metrics, now=ended)

    def _store(self, uri: str, data: bytes) -> None:
        try:
            storage.overwrite(uri, data)
        except ItpnError as error:
            log.warning("%s was not written: %s", uri, error.message)

    def _set_gauges(self, done: int, metrics: dict[str, float], *, now: bool) -> None:
        if now or time.monotonic() - self._gauges_at >= _GAUGES_EVERY_S:
            self._gauges_at = time.monotonic()
            values = {f"train_{name}": value for name, value in metrics.items()}
            publish_gauges({"train_step": done, **values}, self._tags)
