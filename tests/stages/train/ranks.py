"""Start real processes that form a gloo group on a free port, and wait for them with a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from cluster.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[3]
TOY = Path(__file__).with_name("toy.py")


def start(world_size: int, spec: Any, folder: Path, script: Path = TOY) -> list[subprocess.Popen]:
    """One process per rank, running `script SPEC.json`; stderr goes to `folder/rank-N.err`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"spec-{uuid.uuid4().hex[:8]}.json"
    path.write_text(json.dumps(spec))
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu",
            # The same arithmetic on every CPU: no kernels chosen by instruction set.
            "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
        }  # fmt: skip
        with open(folder / f"rank-{rank}.err", "w") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), str(path)], env=environment, stderr=errors, cwd=REPOSITORY
                )
            )
    return processes


def wait(processes: list[subprocess.Popen], timeout_s: float = 300) -> list[int]:
    """Exit codes of all ranks. When one ends badly the others get a little time, then are killed, as torchrun does."""
    deadline = time.monotonic() + timeout_s
    while any(p.poll() is None for p in processes):
        if any(p.poll() not in (None, 0) for p in processes):
            deadline = min(deadline, time.monotonic() + 30)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [p.returncode for p in processes]


def run(world_size: int, spec: Any, folder: Path, timeout_s: float = 300, script: Path = TOY) -> list[int]:
    """`start` and `wait`."""
    return wait(start(world_size, spec, folder, script), timeout_s)


def errors(folder: Path) -> str:
    """What the ranks wrote to stderr."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.err")))


def results(path: Path, world_size: int) -> list[dict[str, Any]]:
    """What each rank wrote as its result."""
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(world_size)]
