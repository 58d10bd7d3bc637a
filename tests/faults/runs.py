"""Training runs that are killed: one output folder, the command that trains into it, and what must hold at the end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from cluster import storage
from stages.train.layout import CHECKPOINTS, checkpoint_steps
from tests.stages.train.ranks import REPOSITORY, TOY
from tests.stages.train.test_resume import consumed, hashes

STEP_S = 0.05
SAME_ARITHMETIC = {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


class Run:
    """One output folder, by default `root/run`, and the command that trains into it; `changes` are the toy's."""

    def __init__(self, root: Path, *, out: str | None = None, **changes: Any) -> None:
        self.root, self.out, self.samples = root, out or str(root / "run"), root / "run.samples"
        self.spec = {"name": "run", "out": self.out, "marks": str(root), "samples": str(self.samples),
                     "kills": [], "step_s": STEP_S, "timeout_s": 60, **changes}  # fmt: skip
        self.steps: int = self.spec["loop"]["schedule"]["steps"]
        (root / "spec.json").write_bytes(storage.canonical_json(self.spec))

    def launch(self) -> subprocess.Popen:
        """torchrun with two ranks and restarts."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "20",
            "--monitor-interval", "0.1", "--standalone", str(TOY), str(self.root / "spec.json"),
        ]  # fmt: skip
        environment = os.environ | SAME_ARITHMETIC | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
        with open(self.root / "run.err", "a") as errors:
            return subprocess.Popen(command, env=environment, stderr=errors, cwd=REPOSITORY)

    def ends_well(self, launcher: subprocess.Popen) -> bool:
        return launcher.wait(timeout=400) == 0

    def let(self, step: int) -> None:
        """Let the ranks take this step and no other after it, until `let` or `open` is called: none ends unkilled."""
        fresh = self.root / "gate.new"
        fresh.write_text(str(step))
        fresh.replace(self.root / "gate")

    def open(self) -> None:
        """Nothing is held back any more."""
        for name in ("gate", "hold-uploads"):
            (self.root / name).unlink(missing_ok=True)

    def begin_upload(self, step: int, interval: int, launcher: subprocess.Popen) -> None:
        """Return when an upload is under way, which stays so until `open`; the ranks stand at the gate of `step`."""
        (self.root / "hold-uploads").touch()
        self.let(step + interval)
        until(lambda: uploads_under_way(self.out), launcher)

    def starts(self) -> list[dict[str, Any]]:
        """Of every start that came to train: the checkpoints that were whole and committed, and its first step."""
        path = Path(f"{self.samples}-starts")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self, rank: int = 0) -> int:
        """The step that a rank is in."""
        path = Path(f"{self.samples}-{rank}")
        lines = path.read_text().splitlines() if path.exists() else []
        return int(lines[-1].split()[0]) if lines else -1

    def killed(self) -> int:
        """How many of the spec's own kills have happened."""
        return len(list(self.root.glob("killed-*")))

    def errors(self) -> str:
        return (self.root / "run.err").read_text()[-4000:]

    def check(self, whole: Run, starts: int, bound: int) -> None:
        """Weights, moments, average, random state and samples are the undisturbed run's; little was done twice.

        `bound` is the most steps that a death may cost: one interval. Saves in the background are made twice as often,
        since one may be under way until the next is due.
        """
        assert hashes(self.out, self.steps) == hashes(whole.out, self.steps)
        ranks = len(list(whole.root.glob("run.samples-[0-9]*")))
        for rank in range(ranks):
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


def uploads_under_way(out: str) -> bool:
    """Whether there are files of a step that is not committed, newer than all that are."""
    newest = max(checkpoint_steps(out), default=0)
    files = storage.list_files(storage.join(out, CHECKPOINTS, "files"))
    steps = [int(found[1]) for info in files if (found := re.search(r"/(\d{9})-[^/]*/[^/]+$", info.uri))]
    return max(steps, default=0) > newest
