"""What a run tells about itself: JSON lines that become files beside the checkpoint, and the live view.

Only rank 0 writes. A line is `{"step": …, "loss": …, …}` or `{"event": …, "step": …, …}`. Lines are cut into
segments at every checkpoint and stored with it, so that after a resume the history has no gap and no double.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from stages.context import Progress


class MetricsWriter:
    """Appends JSON lines to a local file and hands it over, segment by segment."""

    def __init__(self, local_dir: str | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="itpn-metrics-", dir=local_dir))
        self._number = 0
        self._open()

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; what JSON cannot say (NaN, infinities) is written as text."""
        self._file.write(json.dumps({key: _plain(value) for key, value in line.items()}) + "\n")

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


class LiveView:
    """Publishes progress from a thread of its own: the object store's latency must not stall the loop."""

    def __init__(self, out: str, *, total: int, start: int) -> None:
        self._progress = Progress(out, total=total, unit="steps", start=start)
        self._latest: tuple[int, str, dict[str, float]] | None = None
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def update(self, done: int, *, state: str = "running", **metrics: float) -> None:
        """Note the newest state; it is published when its turn comes."""
        self._latest = (done, state, metrics)
        self._wake.set()

    def close(self) -> None:
        """Publish the last state and end the thread."""
        self._ended = True
        self._wake.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            latest, ended = self._latest, self._ended
            if latest is not None:
                done, state, metrics = latest
                self._progress.update(done, state=state, force=ended, **metrics)


class TensorBoardSink:
    """Scalars for TensorBoard (extra `tensorboard`)."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"train/{name}", value, step)

    def image(self, step: int, name: str, image_HWC: Any) -> None:
        """A picture (uint8, height x width x 3)."""
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Clock:
    """Time of a step, and which part of it was spent waiting for data."""

    def __init__(self) -> None:
        self._last, self._last_wait = time.perf_counter(), 0.0

    def lap(self, waited_s: float) -> tuple[float, float]:
        """Seconds since the last lap, and the share of them that the growing total `waited_s` took."""
        now = time.perf_counter()
        took, waited = now - self._last, waited_s - self._last_wait
        self._last, self._last_wait = now, waited_s
        return took, min(waited / took, 1.0) if took > 0 else 0.0


def peak_memory_bytes(device: str) -> int:
    """Most memory held so far: the GPU allocator's on CUDA, else the process's resident set."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value
