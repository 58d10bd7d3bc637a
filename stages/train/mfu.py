"""Model FLOP utilisation: the arithmetic that the model needs per second, over what the accelerators can do.

Needed is what the formulae count (three forward passes of the student for forward and backward, one of the
teacher), whatever else the hardware is made to compute (activation checkpointing). Source: PaLM (2022), appendix B.
"""

from __future__ import annotations

import re

import torch

from cluster.distributed import World
from stages.train.config import EngineConfig

# Dense bf16 peaks, TFLOP/s, by words of the name that torch.cuda.get_device_name gives; the first match counts.
# From the makers' data sheets; where those give the figure with 2:4 sparsity only, half of it.
PEAK_TFLOPS = {
    "GH200": 989.5,
    "H200 NVL": 835.5,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H200": 989.5,
    "H100": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.4,
}


def known_peak_tflops(name: str) -> float | None:
    """Dense bf16 peak of the device of that name; None when it is not in the table, or a part of a device (MIG)."""
    if re.search(r"\bMIG\b", name):
        return None
    found = (peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name))
    return next(found, None)


def peak_flops(config: EngineConfig, world: World) -> float | None:
    """FLOP/s of all ranks' devices together: `engine.peak_tflops` each, else the table's; None when unknown."""
    peak = config.peak_tflops
    if peak is None and world.device.startswith("cuda"):
        peak = known_peak_tflops(torch.cuda.get_device_name(world.device))
    return None if peak is None else peak * 1e12 * world.world_size
