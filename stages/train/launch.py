"""What every training and evaluation rank does around its work: threads, process group, one shared result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import distributed
from cluster.distributed import World
from cluster.errors import ConfigError
from cluster.executor import LocalExecutor
from cluster.resources import Resources
from stages.context import StageContext
from stages.train.config import LoopConfig


def spec_of(context: StageContext, *, timeout_s: float, **values: Any) -> dict[str, Any]:
    """The picklable description of a rank's work: `values` and what ranks need of the context.

    Only work that saves when it is asked to stop gives `marks`, the folder of its checkpoints
    (`cluster.jobs.RayExecutor`). `timeout_s` limits every collective of the group. `gpus` is None in a plain process,
    which takes the GPUs that it finds; elsewhere it is what was granted, so that a step that was granted none never
    computes on a GPU that others were.
    """
    return {
        "out": context.out,
        "files": context.files,
        "attempt": context.attempt,
        "code_version": context.code_version,
        "cpus": context.resources.cpus,
        "gpus": None if isinstance(context.executor, LocalExecutor) else context.resources.gpus,
        "timeout_s": timeout_s,
        **values,
    }


def source_digest() -> str:
    """sha256 of the code that this process runs (the files of stages/ and cluster/), to compare between ranks."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for room in ("cluster", "stages"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def world_sizes(resources: Resources, loop: LoopConfig, streams: int) -> list[int]:
    """The numbers of ranks, ascending, that `resources` allow and that can share the data's streams and the batch.

    Raises ConfigError where there is none, which names the nearest that can.
    """
    able = [n for n in range(1, streams + 1) if streams % n == 0 and loop.global_batch % n == 0]
    fitting = [n for n in able if resources.fewest <= n <= resources.workers]
    if not fitting:
        below = [n for n in able if n < resources.fewest][-1:]
        above = [n for n in able if n > resources.workers][:1]
        count = str(resources.workers)
        if resources.fewest < resources.workers:
            count = f"from {resources.fewest} to {resources.workers}"
        raise ConfigError(
            f"{count} ranks cannot share the work evenly",
            expected=f"a divisor of data.streams = {streams} and of global_batch = {loop.global_batch}",
            found=count,
            remedy=f"the nearest that can: {' or '.join(str(n) for n in below + above)}; streams and batch are part "
            "of a run's identity and are chosen before it begins",
        )
    engine = loop.engine
    if engine.precision == "bf16" and engine.zero_stage == 0 and engine.micro_batch is not None:
        # Fewer ranks would have to cut their share into pieces, which the engine refuses there (zero.py).
        whole = [n for n in fitting if loop.global_batch // n <= engine.micro_batch]
        return whole or fitting  # none: the engine says why
    return fitting


def as_rank(spec: dict[str, Any], body: Callable[[World], dict[str, Any]]) -> dict[str, Any]:
    """Join the other ranks, run `body`, leave; every rank returns what rank 0's body returned."""
    import torch

    # As many threads as CPUs were granted: ranks that share a machine would slow each other down otherwise.
    torch.set_num_threads(max(1, int(spec["cpus"])))
    gpus = spec["gpus"]
    world = distributed.init(timeout_s=spec["timeout_s"], use_gpu=None if gpus is None else gpus > 0)
    if (
        gpus and gpus < 1
    ):  # what this job takes too much fails here, and not in its neighbours on the same GPU
        torch.cuda.set_per_process_memory_fraction(gpus)
    try:
        return distributed.broadcast_object(body(world))
    finally:
        distributed.shutdown()
