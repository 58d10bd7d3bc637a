"""One holder at a time, whatever dies, stops or is cut off."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster import lease as leases
from cluster import storage
from cluster.errors import LeaseHeld, StorageUnavailable
from cluster.lease import Lease

HOLD = """
import contextlib, sys, time
from cluster.errors import StorageUnavailable
from cluster.lease import Lease
with Lease.acquire(sys.argv[1], owner="child", ttl_s=float(sys.argv[2])) as lease:
    print(lease.token, flush=True)
    while True:
        time.sleep(0.05)
        with contextlib.suppress(StorageUnavailable):  # stopped in the middle of a check, or starved: it asks again
            lease.check()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a child process that holds the lease; ends it afterwards."""
    children = []

    def start(prefix: str, ttl_s: float) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, prefix, str(ttl_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "1"
        return child

    yield start
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGCONT)
            child.kill()
        child.communicate()


def test_a_released_lease_passes_on_at_once_with_a_higher_token(any_root):
    prefix = storage.join(any_root, "lease")
    with Lease.acquire(prefix, ttl_s=60) as first:
        assert first.token == 1
        first.check()
        with pytest.raises(LeaseHeld, match="is held by") as caught:
            Lease.acquire(prefix)
        assert caught.value.exit_code == 3
        assert str(os.getpid()) in str(caught.value)
    with Lease.acquire(prefix, ttl_s=60) as second:  # which does not wait
        assert second.token == 2


def test_a_killed_holder_on_this_machine_is_replaced_at_once(real_root, holder, monkeypatch):
    prefix = storage.join(real_root, "lease")
    child = holder(prefix, 600)
    with pytest.raises(LeaseHeld, match=f"child, process {child.pid}"):
        Lease.acquire(prefix)
    monkeypatch.setattr(leases, "DYING_S", 60.0)  # a busy machine is slow to bury it; its ttl is 600 s
    child.kill()
    with Lease.acquire(prefix) as lease:
        assert lease.token == 2


def test_a_zombie_holds_nothing(tmp_path, holder):
    child = holder(str(tmp_path), 600)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and its id stays in the process table
    with Lease.acquire(str(tmp_path)) as lease:
        assert lease.token == 2


def test_a_process_id_used_again_is_not_the_holder():
    mine = leases.Holder(
        token=1,
        owner="me",
        host="here",
        machine=leases._machine(),
        pid=os.getpid(),
        pid_started=leases._process_start(os.getpid()),
        since="",
        ttl_s=30,
    )
    assert not mine.known_dead()
    assert replace(mine, pid_started=mine.pid_started - 1).known_dead()
    assert not replace(mine, pid_started=0, machine="elsewhere").known_dead()


def test_a_silent_holder_elsewhere_is_replaced_after_its_ttl(seaweedfs_root, holder, monkeypatch):
    prefix = storage.join(seaweedfs_root, "lease")
    ttl_s = 5.0  # of which a busy machine may take some from the child
    child = holder(prefix, ttl_s)
    # As seen from another machine, where the process id says nothing.
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")
    with pytest.raises(LeaseHeld):
        Lease.acquire(prefix, wait_s=1.2 * ttl_s)  # longer than its ttl: a holder that beats is left alone
    child.kill()
    told = []
    began = time.monotonic()
    with Lease.acquire(prefix, wait_s=None, on_wait=told.append) as lease:
        assert time.monotonic() - began > ttl_s
        assert lease.token == 2
        assert {holder.pid for holder in told} == {child.pid}


def test_even_without_waiting_a_holder_that_died_elsewhere_is_replaced(tmp_path, holder, monkeypatch):
    prefix = str(tmp_path / "lease")
    child = holder(prefix, 1.0)
    child.kill()
    child.wait()
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")
    soon, long_ago = time.time() + 60, time.time() - 60
    for file in Path(prefix).iterdir():
        os.utime(file, (soon, soon))
    with pytest.raises(LeaseHeld, match="last heard of 0 s ago"):
        Lease.acquire(prefix)  # nothing says yet that it died
    for file in Path(prefix).iterdir():
        os.utime(file, (long_ago, long_ago))
    began = time.monotonic()
    with Lease.acquire(prefix) as lease:
        assert lease.token == 2
        assert time.monotonic() - began > 1, "an old beat is a hint, its standing still the proof"


def test_a_stopped_holder_finds_out_that_it_lost_the_lease(tmp_path, holder):
    child = holder(str(tmp_path), 1.0)
    child.send_signal(signal.SIGSTOP)
    with Lease.acquire(str(tmp_path), ttl_s=60, wait_s=120) as lease:
        assert lease.token == 2
        child.send_signal(signal.SIGCONT)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "LeaseHeld" in errors and "was lost" in errors
        lease.check()


def test_a_holder_that_cannot_renew_does_not_know_until_it_can_again(tmp_path, monkeypatch):
    lease = Lease.acquire(str(tmp_path / "lease"), ttl_s=3.0)

    def unavailable(*args, **kwargs):
        raise StorageUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "overwrite", unavailable)
        time.sleep(3.3)
        with pytest.raises(StorageUnavailable, match="could not be renewed"):
            lease.check()
    deadline = time.monotonic() + 60
    while True:
        try:
            lease.check()  # nobody wanted it meanwhile, so it goes on
            break
        except StorageUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    lease.release()


def test_a_lease_that_was_taken_or_deleted_fails_its_check(tmp_path):
    prefix = str(tmp_path / "lease")
    with Lease.acquire(prefix, ttl_s=60) as lease:
        storage.write_exclusive(storage.join(prefix, "00000002.json"), b"{}")
        with pytest.raises(LeaseHeld, match="tenure 2 has begun"):
            lease.check()
    storage.delete_tree(prefix)
    with Lease.acquire(prefix, ttl_s=60) as lease:
        storage.delete_tree(prefix)
        with pytest.raises(LeaseHeld, match="deleted"):
            lease.check()


def test_old_tenures_are_pruned(tmp_path):
    prefix = str(tmp_path / "lease")
    for token in range(1, 6):
        with Lease.acquire(prefix) as lease:
            assert lease.token == token
    assert set(leases._tokens(prefix)) == {4, 5}


def test_a_contender_that_overslept_does_not_take_a_pruned_number(tmp_path):
    prefix = str(tmp_path / "lease")
    for _ in range(4):
        Lease.acquire(prefix).release()
    assert leases._claim(prefix, 2, "late", 30) is None
    assert set(leases._tokens(prefix)) == {3, 4}


def test_waiting_ends_when_the_holder_lets_go(tmp_path):
    first = Lease.acquire(str(tmp_path), ttl_s=60)
    threading.Timer(0.4, first.release).start()
    with Lease.acquire(str(tmp_path), wait_s=None) as second:
        assert second.token == 2


def test_contenders_never_hold_together(real_root):
    prefix, context = storage.join(real_root, "lease"), multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=_contend, args=(prefix, results)) for _ in range(3)]
    for child in children:
        child.start()
    tenures = sorted(tenure for _ in children for tenure in results.get())
    for child in children:
        child.join(30)
    assert [token for token, _, _ in tenures] == list(range(1, 7))
    for (_, _, end), (_, begin, _) in pairwise(tenures):
        assert end <= begin


def _contend(prefix, results):
    tenures = []
    for _ in range(2):
        with Lease.acquire(prefix, ttl_s=60, wait_s=None) as lease:
            begin = time.monotonic()
            time.sleep(0.01)
            lease.check()
            tenures.append((lease.token, begin, time.monotonic()))
    results.put(tenures)
