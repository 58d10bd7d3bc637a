"""kill -9 of ranks and of the launcher at 30 seeded instants: every run ends by itself as the undisturbed one did."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from tests.stages.train.ranks import REPOSITORY, TOY
from tests.stages.train.test_resume import consumed, hashes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, INTERVAL = 16, 4
LOOP: dict[str, Any] = {
    "global_batch": 8,
    "schedule": {"steps": STEPS, "warmup_steps": 2},
    "optimiser": {"lr": 0.01},
    "checkpoint": {"save_every_steps": INTERVAL},
    "ema_decay": 0.9,
}
# What a save consists of; each is a place to die. A rank's first start writes up to 4 checkpoints.
PLACES = [
    "half save_file",
    "before save_file",
    "after save_file",
    "before upload_file",
    "after upload_file",
    "before write_json_exclusive",
    "after write_json_exclusive",
]


def launch(root: Path, name: str, kills: list[dict[str, Any]], **changes: Any) -> subprocess.Popen:
    """torchrun with two ranks and restarts, in a process group of its own."""
    spec = {
        "loop": LOOP, "name": name, "out": str(root / name), "samples": str(root / f"{name}.samples"),
        "kills": kills, "timeout_s": 20, **changes,
    }  # fmt: skip
    (root / name).mkdir(exist_ok=True)
    path = root / f"{name}.json"
    path.write_bytes(storage.canonical_json(spec))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "20",
        "--monitor-interval", "0.2", "--standalone", str(TOY), str(path),
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
    }  # fmt: skip
    with open(root / f"{name}.err", "a") as errors:
        return subprocess.Popen(
            command, env=environment, stderr=errors, cwd=REPOSITORY, start_new_session=True
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert launch(root, "whole", []).wait(timeout=300) == 0
    return root


def check(root: Path, name: str, undisturbed: Path, starts: int) -> None:
    """Weights, moments, average, random state and samples equal the undisturbed run's; little was done twice."""
    assert hashes(root / name, STEPS) == hashes(undisturbed / "whole", STEPS)
    for rank in range(2):
        assert consumed(root, name, rank) == consumed(undisturbed, "whole", rank)
        steps = [int(line.split()[0]) for line in (root / f"{name}.samples-{rank}").read_text().splitlines()]
        gone_back = [before - after + 1 for before, after in pairwise(steps) if after <= before]
        # One interval, and the one that was being saved in the background while training went on.
        assert all(lost <= 2 * INTERVAL for lost in gone_back), gone_back
    assert starts >= 1


@pytest.mark.parametrize("seed", range(5))
def test_killed_ranks_are_restarted_and_lose_nothing(seed, tmp_path, undisturbed):
    """5 instants in each of 5 runs: two in steps, three inside a save or an upload."""
    draw = random.Random(seed)
    kills = [{"where": "step", "number": draw.randrange(STEPS), "rank": draw.randrange(2)} for _ in range(2)]
    for place in draw.sample(PLACES, 3):
        rank = 0 if "json" in place else draw.randrange(2)
        kills.append({"where": place, "number": draw.randint(1, 3), "rank": rank})
    assert launch(tmp_path, "run", kills).wait(timeout=600) == 0, (tmp_path / "run.err").read_text()[-3000:]
    fired = len(list((tmp_path / "run").glob("killed-*")))
    assert fired >= 2
    check(tmp_path, "run", undisturbed, fired)


@pytest.mark.parametrize("seed", range(5))
def test_killed_launcher_and_all_ranks_at_once(seed, tmp_path, undisturbed):
    """SIGKILL to the whole group at a random time of the run; starting again finishes it."""
    draw = random.Random(100 + seed)
    process = launch(tmp_path, "run", [], step_s=0.3)
    samples = tmp_path / "run.samples-0"
    while not (samples.exists() and Path(f"{tmp_path}/run.samples-1").exists()) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 5))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ranks = [int((tmp_path / f"run.samples-{rank}.pid").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks), "ranks outlived their launcher"
    assert launch(tmp_path, "run", []).wait(timeout=300) == 0
    check(tmp_path, "run", undisturbed, 1)
