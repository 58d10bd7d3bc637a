"""kill -9 at 30 seeded instants: of ranks, inside saves and uploads, of the launcher. All runs end as if undisturbed.

Two real gloo processes under torchrun, which restarts the group when a rank dies; after the death of the launcher the
same command is issued again, and nothing else is done.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import storage
from tests.stages.train.ranks import REPOSITORY, TOY
from tests.stages.train.test_resume import consumed, hashes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, INTERVAL, STEP_S = 44, 4, 0.05
INSTANTS = 10  # of each of the three kinds
LOOP: dict[str, Any] = {
    "global_batch": 8,
    "schedule": {"steps": STEPS, "warmup_steps": 2},
    "optimiser": {"lr": 0.01},
    "checkpoint": {"save_every_steps": INTERVAL},
    "ema_decay": 0.9,
}
IN_THE_FOREGROUND = LOOP | {"checkpoint": {"save_every_steps": INTERVAL, "background": False}}
# What a save consists of; each is a place to die. Rank 0 writes two files and uploads three, rank 1 one.
PLACES = [(f"{when} save_file", 2, 1) for when in ("half", "before", "after")]
PLACES += [(f"{when} upload_file", 3, 1) for when in ("before", "after")]
PLACES += [(f"{when} write_json_exclusive", 1, 0) for when in ("before", "after")]


class Run:
    """One output folder and the command that trains into it."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root, self.out, self.samples = root, root / "run", root / "run.samples"
        self.out.mkdir()
        spec = {"loop": LOOP, "name": "run", "out": str(self.out), "samples": str(self.samples), "kills": [],
                "step_s": STEP_S, "timeout_s": 60, **changes}  # fmt: skip
        (root / "spec.json").write_bytes(storage.canonical_json(spec))

    def launch(self) -> subprocess.Popen:
        """torchrun with two ranks and restarts."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "20",
            "--monitor-interval", "0.1", "--standalone", str(TOY), str(self.root / "spec.json"),
        ]  # fmt: skip
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
        }  # fmt: skip
        with open(self.root / "run.err", "a") as errors:
            return subprocess.Popen(command, env=environment, stderr=errors, cwd=REPOSITORY)

    def ends_well(self, launcher: subprocess.Popen) -> bool:
        return launcher.wait(timeout=400) == 0

    def starts(self) -> list[dict[str, Any]]:
        """Of every start that came to train: the checkpoints that were whole and committed, and its first step."""
        path = Path(f"{self.samples}-starts")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self, rank: int = 0) -> int:
        """The step that a rank is in."""
        path = Path(f"{self.samples}-{rank}")
        lines = path.read_text().splitlines() if path.exists() else []
        return int(lines[-1].split()[0]) if lines else -1

    def errors(self) -> str:
        return (self.root / "run.err").read_text()[-4000:]

    def check(self, whole: Run, starts: int, bound: int) -> None:
        """Weights, moments, average, random state and samples are the undisturbed run's; little was done twice."""
        assert hashes(self.out, STEPS) == hashes(whole.out, STEPS)
        for rank in range(2):
            assert consumed(self.root, "run", rank) == consumed(whole.root, "run", rank)
        taken = [int(line.split()[0]) for line in Path(f"{self.samples}-0").read_text().splitlines()]
        lost = [before - after for before, after in pairwise(taken) if after <= before]
        assert all(steps <= bound for steps in lost), lost
        # `committed` in toy.py has hashed all files of each: nothing incomplete was ever there to be loaded.
        assert all(start["resumed"] == max(start["committed"], default=0) for start in self.starts())
        assert len(self.starts()) >= starts


def until(condition: Callable[[], Any], launcher: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.005)


def ranks_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """The rank processes of a launcher that live now."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error, KeyError):
                if str(TOY) in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), step_s=0)
    assert run.ends_well(run.launch()), run.errors()
    return run


def test_ten_killed_ranks_are_restarted_and_lose_at_most_an_interval(whole, tmp_path):
    """At random times of the run, from outside; saves in the foreground, so that the bound is exact."""
    draw = random.Random(6)
    run = Run(tmp_path, loop=IN_THE_FOREGROUND)
    launcher = run.launch()
    for number, target in enumerate(sorted(draw.sample(range(1, STEPS - 2), INSTANTS))):
        until(lambda n=number: len(run.starts()) == n + 1, launcher)
        until(lambda step=target: run.step() >= step, launcher)
        time.sleep(draw.uniform(0, STEP_S))
        ranks_of(launcher)[draw.randrange(2)].kill()
    assert run.ends_well(launcher), run.errors()
    run.check(whole, INSTANTS + 1, bound=INTERVAL)


def test_ten_ranks_killed_inside_saves_and_uploads(whole, tmp_path):
    """Each place of a save at least once; saves in the background, so that one may be under way when another is due."""
    draw = random.Random(7)
    places = draw.sample(PLACES, len(PLACES)) + draw.sample(PLACES, INSTANTS - len(PLACES))
    steps = draw.sample(range(INTERVAL, STEPS, INTERVAL), INSTANTS)
    kills = []
    for (where, of_rank_0, of_rank_1), step in zip(places, steps, strict=True):
        rank = draw.randrange(2) if of_rank_1 else 0
        call = draw.randrange(of_rank_1 if rank else of_rank_0)
        kills.append({"where": where, "step": step, "rank": rank, "call": call})
    run = Run(tmp_path, kills=kills)
    assert run.ends_well(run.launch()), run.errors()
    assert len(list(run.out.glob("killed-*"))) == INSTANTS
    run.check(whole, INSTANTS + 1, bound=INTERVAL)


def test_ten_killed_launchers_take_their_ranks_with_them_and_the_same_command_goes_on(whole, tmp_path):
    """3 while the ranks start, 3 inside a slow upload, 4 in steps."""
    draw = random.Random(8)
    run = Run(tmp_path, upload_s=0.1)
    kinds = draw.sample(["start"] * 3 + ["upload"] * 3 + ["step"] * 4, INSTANTS)
    for kind, target in zip(kinds, sorted(draw.sample(range(1, STEPS - INTERVAL), INSTANTS)), strict=True):
        launcher, before = run.launch(), len(run.starts())
        until(lambda process=launcher: len(ranks_of(process)) == 2, launcher)
        if kind == "start":
            time.sleep(draw.uniform(0, 2))
        else:
            until(lambda n=before: len(run.starts()) > n, launcher)
            until(lambda step=target: run.step() >= step, launcher)
            if kind == "upload":
                until(lambda: uploads_under_way(run.out), launcher)
            else:
                time.sleep(draw.uniform(0, STEP_S))
        ranks = ranks_of(launcher).values()
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive, "ranks outlived their launcher"
    assert run.ends_well(run.launch()), run.errors()
    run.check(whole, 7 + 1, bound=INTERVAL)


def uploads_under_way(out: Path) -> bool:
    """Whether there are files of a step that is not committed, newer than all that are."""
    committed = max((int(path.stem) for path in out.glob("checkpoints/*.json")), default=0)
    steps = [int(path.name[:9]) for path in out.glob("checkpoints/files/*")]
    return max(steps, default=0) > committed
