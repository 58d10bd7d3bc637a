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
        min_workers: as few as this will do where there is no room for `workers`; None asks for all of them. Only
            groups whose ranks talk to each other (`Executor.workers`) look at it.
        cpus: logical CPUs per worker; may be fractional.
        gpus: GPUs per worker; a fraction lets jobs of one worker share one.

    Raises ConfigError for a share of a GPU that no scheduler or collective can give.
    """

    workers: int = 1
    min_workers: int | None = None
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

        if not 1 <= self.fewest <= self.workers:
            raise ConfigError(
                "a step cannot have this number of workers",
                expected="1 <= min_workers <= workers",
                found=f"min_workers={self.min_workers}, workers={self.workers}",
            )

    @property
    def fewest(self) -> int:
        """The number of workers that it cannot do without."""
        return self.workers if self.min_workers is None else self.min_workers

    def __str__(self) -> str:
        gpu = f" + {self.gpus:g} GPU" if self.gpus else ""
        count = f"{self.workers}" if self.fewest == self.workers else f"{self.fewest} to {self.workers}"
        return f"{count} x ({self.cpus:g} CPU{gpu})"


def cpu_count() -> int:
    """Logical CPUs that this process may use (its affinity mask, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
