"""What is measured while training runs: JSON lines, event files for TensorBoard, times, means.

A line is `{"step": …, "loss": …, …}` or `{"event": …, "step": …, …}`. Lines and event files are cut into
segments at every checkpoint and stored with it, so that after a resume the history has no gap and no double.
"""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import shutil
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster import scratch
from cluster.errors import ConfigError

SMOOTHING = 0.98  # about the last 50 steps


class MetricsWriter:
    """Appends JSON lines to a local file and hands it over, segment by segment."""

    def __init__(self, local_dir: str | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="metrics-", dir=scratch.folder(local_dir)))
        self._number = 0
        self._open()

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; what JSON cannot say (NaN, infinities) is written as text."""
        self._file.write(json.dumps({key: plain(value) for key, value in line.items()}) + "\n")

    def cut(self) -> Path:
        """Close the current segment, start the next, and give the closed one's path."""
        self._file.close()
        path = self._path
        self._number += 1
        self._open()
        return path

    def close(self) -> None:
        """Remove what is left on the local disk."""
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self) -> None:
        self._path = self._folder / f"{self._number:06d}.jsonl"
        self._file = open(self._path, "w", buffering=1)  # noqa: SIM115 (closed by cut and close)


def require_tensorboard() -> None:
    """Raise ConfigError where the extra is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "watch.tensorboard is on, but tensorboard is not installed",
            remedy="pip install 'itpn-pipeline[tensorboard]', or set watch.tensorboard=false",
        )


class TensorBoardWriter:
    """Scalars and pictures for TensorBoard (extra `tensorboard`), in event files that are handed over like the lines.

    Their names sort by time, as TensorBoard reads them. The first file of an attempt tells it to forget what an
    attempt before wrote from step `start` + 1 on.
    """

    def __init__(self, local_dir: str | None, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._folder = Path(tempfile.mkdtemp(prefix="tensorboard-", dir=scratch.folder(local_dir)))
        self._number = 0
        self._open(purge_step=start + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add what is finite under `train/`."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"train/{name}", value, step)

    def picture(self, step: int, image_HWC: Any) -> None:
        """Add a picture (uint8, height x width x 3)."""
        self._writer.add_image("picture", image_HWC, step, dataformats="HWC")

    def cut(self) -> Path:
        """Close the current event file, start the next, and give the closed one's path."""
        self._writer.close()
        [path] = self._segment.iterdir()
        self._number += 1
        self._open()
        return path

    def close(self) -> None:
        """Remove what is left on the local disk."""
        self._writer.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self, purge_step: int | None = None) -> None:
        self._segment = self._folder / f"{self._number:06d}"
        self._writer = self._make(str(self._segment), purge_step=purge_step)


@dataclass
class Smoothed:
    """Running means of what the steps gave, the last about 50 weighing most; equal on all ranks."""

    weight: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Take in one step's values; a step with one that is not finite is left out."""
        if all(math.isfinite(value) for value in values.values()):
            self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
            for name, value in values.items():
                self.sums[name] = SMOOTHING * self.sums.get(name, 0.0) + (1 - SMOOTHING) * value

    def means(self) -> dict[str, float]:
        """The mean of every value; empty before the first step."""
        return {name: value / self.weight for name, value in self.sums.items()}


class Clock:
    """Time of a step, and which part of it was spent waiting for data."""

    def __init__(self) -> None:
        self._last, self._last_wait = time.perf_counter(), 0.0

    def lap(self, waited_s: float) -> tuple[float, float]:
        """Seconds since the last lap, and those of them that the growing total `waited_s` took."""
        now = time.perf_counter()
        took, waited = now - self._last, waited_s - self._last_wait
        self._last, self._last_wait = now, waited_s
        return took, min(waited, took)


@dataclass
class Speed:
    """images/s, MFU and the share of waiting for data, over the last steps.

    Args:
        batch: images of a step, over all ranks.
        flops_per_image: of a step, for one image; None when nobody counted them.
        peak: FLOP/s of all devices together; None when unknown. Without either there is no MFU.
    """

    batch: int
    flops_per_image: float | None
    peak: float | None
    laps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))

    def of(self, steps: int, took: float, waited: float) -> dict[str, float]:
        """The figures of so many steps, which took and waited so many seconds in all."""
        images_per_s = steps * self.batch / max(took, 1e-9)
        found = {"images_per_s": images_per_s}
        if self.flops_per_image and self.peak:
            found["mfu"] = images_per_s * self.flops_per_image / self.peak
        return found | {"data_wait_share": waited / max(took, 1e-9)}

    def lap(self, took_s: float, waited_s: float) -> dict[str, float]:
        """The figures of the step that took that long."""
        self.laps.append((took_s, waited_s))
        return self.of(1, took_s, waited_s)

    def recent(self) -> dict[str, float]:
        """The figures of the last 20 steps together."""
        took, waited = (sum(column) for column in zip(*self.laps, strict=True))
        return self.of(len(self.laps), took, waited)


def peak_memory_bytes(device: str) -> int:
    """Most memory held so far: the GPU allocator's on CUDA, else the process's resident set."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain(value: Any) -> Any:
    """The value as JSON can say it: a float that is not finite becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value
