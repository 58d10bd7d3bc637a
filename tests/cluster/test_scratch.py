"""Temporary folders of processes that are alive stay; those of dead ones go with the next start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from cluster import scratch

KEEP = """
import sys
from cluster import scratch
mine = scratch.folder(sys.argv[1])
assert scratch.folder(sys.argv[1]) == mine
(mine / "file").write_bytes(b"x")
print(mine, flush=True)
sys.stdin.readline()
"""


def start(parent: Path) -> tuple[subprocess.Popen, Path]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_is_not(tmp_path):
    killed, dead = start(tmp_path)
    living, alive = start(tmp_path)
    assert dead != alive and (dead / "file").exists(), "a living one's is not swept"
    killed.kill()
    killed.wait()
    mine = scratch.folder(tmp_path)
    assert not dead.exists()
    assert (alive / "file").exists() and mine.parent == alive.parent
    living.communicate("end\n")
    assert living.returncode == 0 and not alive.exists(), "an orderly end leaves nothing"


def test_what_may_be_alive_is_left(tmp_path):
    living, alive = start(tmp_path)
    (alive / ".lock").unlink()  # a cleaner of old files took it
    neighbour = alive.parent / f"{socket.gethostname()}-1-abc"  # of a host whose name begins like ours
    neighbour.mkdir()
    (neighbour / ".lock").touch()
    scratch._sweep(alive.parent, socket.gethostname())
    assert (alive / "file").exists() and neighbour.exists()
    living.communicate("end\n")
