"""Processes alone leave nothing behind that another group could stumble over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster import distributed
from cluster.errors import ConfigError, StepFailed, portable


def test_port_of_a_process_alone_is_forgotten(monkeypatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert distributed.init(use_gpu=False).world_size == 1 and os.environ["MASTER_PORT"]
    distributed.shutdown()
    assert "MASTER_PORT" not in os.environ


def test_time_limit_holds_for_groups_that_libraries_make_later() -> None:
    import torch
    import torch.distributed as dist

    def limit_s() -> float:
        backend = dist.new_group([0])._get_backend(torch.device("cpu"))
        return backend.options._timeout.total_seconds()

    distributed.init(use_gpu=False, timeout_s=7)
    assert limit_s() == 7
    distributed.shutdown()
    distributed.init(use_gpu=False)
    assert limit_s() == distributed.DEFAULT_TIMEOUT_S
    distributed.shutdown()
    assert dist.distributed_c10d.default_pg_timeout == dist.constants.default_pg_timeout


def test_port_that_was_given_stays(monkeypatch) -> None:
    given = str(distributed.free_port())
    monkeypatch.setenv("MASTER_PORT", given)
    distributed.init(use_gpu=False)
    distributed.shutdown()
    assert os.environ["MASTER_PORT"] == given


def test_errors_that_cannot_travel_are_told_in_words() -> None:
    class Local(Exception):  # a class that another process cannot import
        pass

    assert isinstance(portable(Local("full")), StepFailed) and "Local: full" in str(portable(Local("full")))
    known = ConfigError("wrong", expected=1, found=2)
    assert portable(known) is known


def test_rank_that_leaves_flushes_and_runs_its_handlers() -> None:
    program = (
        "import atexit; from cluster import distributed; atexit.register(print, 'bye'); distributed.leave(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "bye\n"), done.stderr
