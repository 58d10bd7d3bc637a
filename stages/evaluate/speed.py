"""The speed evaluator: throughput, latency, peak memory and FLOPs of forward passes on one device.

Rank 0 measures while the others wait. The images are random and lie on the device already: it is the model that is
measured, not the reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cluster import distributed
from stages.evaluate.config import Acceleration, Speed
from stages.evaluate.found import Found, Values
from stages.evaluate.setting import acceleration_of, configure, name_of
from stages.model.flops import backbone_flops

if TYPE_CHECKING:
    from stages.evaluate.workbench import Workbench


def sweep(bench: Workbench, config: Speed) -> Iterator[Found]:
    """Every combination of sizes, settings and batches. Collective: every rank calls it once."""
    sizes = config.image_sizes or (bench.config.data.view.size,)
    for size, acceleration in product(sizes, config.settings):
        found = distributed.on_rank_zero(partial(_of_model, bench, config, acceleration, size))
        yield from (Found(**item) for item in found)


def _of_model(bench: Workbench, config: Speed, acceleration: Acceleration, size: int) -> list[dict[str, Any]]:
    """One model at every batch size. A batch that does not fit into memory is left out, with a note."""
    backbone, device = configure(bench.weights.backbone, acceleration, size), device_name(bench.device)
    model = bench.weights.model(backbone).to(bench.device, bench.dtype)
    flops = backbone_flops(backbone, size, size, bench.weights.num_classes).total
    how: dict[str, Any] = {"warmup": config.warmup, "iterations": config.iterations}
    common = {"kind": "speed", "precision": bench.config.precision, "device": device, **how}
    found = []
    for batch in config.batch_sizes:
        variant, values, notes = f"{name_of(backbone)} {size}px b{batch}", [], []
        run = partial(speed, model, batch=batch, image_size=size, flops=flops, **how)
        try:
            values = list(run(device=bench.device, dtype=bench.dtype))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            notes = [
                f"speed {variant}: a batch of {batch} images of {size} px does not fit into the memory of {device}, "
                f"and is not measured: take {batch} out of the evaluator's batch_sizes, or lower its image_sizes"
            ]
        if notes and bench.device.startswith("cuda"):
            torch.cuda.empty_cache()  # what the failed batch left, so that the next is measured as if alone
        if values and "peak_memory_bytes" not in dict(values):
            notes = [
                f"speed {variant}: this system does not tell a process's peak memory (/proc/self/clear_refs)"
            ]
        facts = {"batch_size": batch, "image_size": size, "acceleration": acceleration_of(backbone)}
        item = Found(
            values=values,
            samples=batch * config.iterations,
            evaluator=common | facts,
            variant=variant,
            on_data=False,
            notes=notes,
        )
        found.append(asdict(item))
    return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the CPU had too little memory; PyTorch's CPU allocator says so in its message only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def device_name(device: str) -> str:
    """What a figure of speed belongs to: the GPU's name, or the CPU's with the threads that are used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


@torch.inference_mode()
def speed(
    forward: Callable[[Tensor], object],
    *,
    batch: int,
    image_size: int,
    flops: int,
    warmup: int,
    iterations: int,
    device: str,
    dtype: torch.dtype,
) -> Values:
    """Yield `images_per_s`, `latency_p50_ms`, `latency_p99_ms`, `peak_memory_bytes`, `flops`.

    Memory: on a GPU the most that tensors took, weights included; on a CPU the largest resident set of the process,
    left out where the system cannot tell. `flops` are of one image, matrix products only, 2 per multiply-add.
    """
    images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(device, dtype)
    for _ in range(warmup):
        forward(images)
    peak_bytes = _peak_memory(device)
    seconds = np.empty(iterations)
    for iteration in range(iterations):
        _wait(device)
        began = time.perf_counter()
        forward(images)
        _wait(device)
        seconds[iteration] = time.perf_counter() - began
    yield "images_per_s", batch * iterations / seconds.sum().item()
    yield "latency_p50_ms", 1e3 * np.percentile(seconds, 50).item()
    yield "latency_p99_ms", 1e3 * np.percentile(seconds, 99).item()
    if (peak := peak_bytes()) is not None:
        yield "peak_memory_bytes", float(peak)
    yield "flops", float(flops)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _peak_memory(device: str) -> Callable[[], int | None]:
    """Begin a measurement of peak memory; the result, when called, is in bytes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident set back
    except OSError:
        return lambda: None
    return _peak_resident_set


def _peak_resident_set() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
