"""What one step asks of the machines. Never part of a step's identity."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Workers of a step and what each of them gets.

    Args:
        workers: processes that work together on the step (training ranks, or shard writers).
        cpus: logical CPUs per worker; may be fractional.
        gpus: GPUs per worker; a fraction lets jobs of one worker share one.

    Raises ConfigError for a share of a GPU that no scheduler or collective can give.
    """

    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.gpus % 1 and (self.gpus > 1 or self.workers > 1):
            raise ConfigError(
                f"{self} cannot be given",
                expected="whole GPUs for each worker, or a part of one for a single worker",
                found=f"{self.gpus:g} GPU for each of {self.workers}",
                remedy="ranks that train together cannot share a GPU (NCCL refuses): use one worker, or whole GPUs",
            )

    def __str__(self) -> str:
        gpu = f" + {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.workers} x ({self.cpus:g} CPU{gpu})"


def cpu_count() -> int:
    """Logical CPUs that this process may use (its affinity mask, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
