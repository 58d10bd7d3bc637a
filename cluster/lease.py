"""A lease that one process at a time holds, kept in object storage: no server, no clock that must agree.

Under the lease's prefix, each tenure has a number, the fencing token:
    00000007.json       created exclusively: whoever creates the next number holds the lease
    00000007.beat       overwritten by the holder every third of its time to live (ttl)
    00000007.released   written when the holder lets go

A contender takes the next number when the highest one was released, when its holder is a dead process of
this very machine, or when its beat has not changed for ttl seconds on the contender's own clock. A holder
that finds a higher number has lost the lease and `check` says so. One that could not renew for ttl seconds
(an outage, a suspended machine) does not know: `check` raises StorageUnavailable until a beat went through
and its number was found to be the highest still; nobody wanted the lease, so it goes on.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from cluster import storage
from cluster.errors import AlreadyExists, ItpnError, LeaseHeld, NotFound, StorageUnavailable

log = logging.getLogger(__name__)

ON_WAIT_EVERY_S = 5.0
KEEP_TENURES = 2
DYING_S = 0.5  # a process that was killed just now is still listed for a moment


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its object says."""

    token: int
    owner: str
    host: str
    machine: str  # tells hosts, boots and containers apart; process ids mean something only inside one
    pid: int
    pid_started: float
    since: str  # ISO 8601, UTC
    ttl_s: float
    released: bool = False
    beat_at: float = 0.0  # of its last beat, seconds since the epoch, by the store's clock

    def __str__(self) -> str:
        silent_s = max(time.time() - self.beat_at, 0.0)
        return (
            f"{self.owner}, process {self.pid} on {self.host} since {self.since}, "
            f"last heard of {silent_s:.0f} s ago"
        )

    def looks_dead(self) -> bool:
        """Whether its beat seems to stand still. Only a hint, since it compares two clocks."""
        return time.time() - self.beat_at > 2 * self.ttl_s

    def is_neighbour(self) -> bool:
        """Whether the holder is another process of this machine."""
        return self.machine == _machine() and self.pid != os.getpid()

    def known_dead(self) -> bool:
        """Whether the holder was a process of this machine that is no more."""
        return self.machine == _machine() and _process_start(self.pid) != self.pid_started


class Lease:
    """A held lease; use it as a context manager, which releases it. Made by `acquire`."""

    def __init__(self, prefix: str, holder: Holder, renewed: float) -> None:
        self.token, self.holder = holder.token, holder
        self._prefix, self._ttl_s = prefix, holder.ttl_s
        self._lost = ""  # why, once it is
        self._renewed = renewed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {prefix}", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        uri_prefix: str,
        owner: str | None = None,
        ttl_s: float = 30.0,
        wait_s: float | None = 0,
        on_wait: Callable[[Holder], None] | None = None,
    ) -> Self:
        """Take the lease.

        Args:
            uri_prefix: where the lease lives.
            owner: a name for people, by default the user's.
            ttl_s: after how many silent seconds another process may take over.
            wait_s: how long to wait while another process holds it; 0 not at all, None for ever. A holder
                that is probably dead is always given the time to make sure: half a second for a process
                of this machine, its ttl where the last beat looks old.
            on_wait: called with the holder when the wait begins and now and then while it lasts.

        Raises:
            LeaseHeld: when another process still holds it after `wait_s`.
        """
        prefix = storage.join(uri_prefix)
        began, told, watch = time.monotonic(), -ON_WAIT_EVERY_S, _Watch()
        while True:
            holder = _latest(prefix)
            if holder is None or holder.released or holder.known_dead() or watch.expired(prefix, holder):
                before = _clock()  # no contender can have seen the tenure earlier
                mine = _claim(prefix, holder.token + 1 if holder else 1, owner or _user(), ttl_s)
                if mine is not None:
                    lease = cls(prefix, mine, before)
                    with contextlib.suppress(ItpnError):
                        _prune(prefix, mine.token)
                    return lease
                continue  # another contender was quicker
            waited_s = time.monotonic() - began
            limit_s = wait_s
            if limit_s is not None:
                # Never longer than it takes to be sure of a death that is likely; else no process that does
                # not wait could ever follow one that died elsewhere.
                likely_s = DYING_S if holder.is_neighbour() else 0.0
                limit_s = max(limit_s, 1.2 * holder.ttl_s if holder.looks_dead() else likely_s)
            if limit_s is not None and waited_s >= limit_s:
                raise LeaseHeld(
                    f"{prefix} is held by {holder}",
                    remedy=f"wait until it has finished; if it died, others may take over {holder.ttl_s:g} s later",
                )
            if on_wait is not None and waited_s - told >= ON_WAIT_EVERY_S:
                told = waited_s
                on_wait(holder)
            pause_s = min(max(holder.ttl_s / 10, 0.02), 0.5 if waited_s > DYING_S else 0.05)
            time.sleep(pause_s if limit_s is None else min(pause_s, max(limit_s - waited_s, 0.001)))

    def check(self) -> None:
        """Call it before anything that others see.

        Raises:
            LeaseHeld: this process no longer holds the lease.
            StorageUnavailable: the store could not be asked, or the lease was not renewed for its ttl.
        """
        self._raise_if_lost()
        tokens = _tokens(self._prefix, deadline_s=self._ttl_s)
        if self.token not in tokens:
            self._lose("its object was deleted")
        elif max(tokens) > self.token:
            self._lose(f"tenure {max(tokens)} has begun")
        self._raise_if_lost()
        silent_s = _clock() - self._renewed
        if silent_s > self._ttl_s:
            raise StorageUnavailable(
                f"the lease {self._prefix} could not be renewed for {silent_s:.0f} s",
                remedy="the object store did not answer; run again when it does",
            )

    def release(self) -> None:
        """Let go: the next contender need not wait. Never raises; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(ItpnError):
            storage.overwrite(_uri(self._prefix, self.token, "released"), b"{}", deadline_s=5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _raise_if_lost(self) -> None:
        if self._lost:
            raise LeaseHeld(
                f"the lease {self._prefix} was lost: {self._lost}",
                expected=f"tenure {self.token} to be held by {self.holder}",
                remedy="run again: it waits for the new holder and reuses what that one finishes",
            )

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason

    def _beat(self) -> None:
        count, period_s = 0, self._ttl_s / 3
        while not self._stop.is_set() and not self._lost:
            count += 1
            now, pause_s = _clock(), period_s
            try:
                storage.overwrite(
                    _uri(self._prefix, self.token, "beat"), str(count).encode(), deadline_s=period_s
                )
                if now - self._renewed > self._ttl_s:
                    # Silent for so long that another may have taken over before this beat.
                    tokens = _tokens(self._prefix, deadline_s=period_s)
                    if max(tokens, default=0) != self.token:
                        self._lose("another tenure began while it could not be renewed")
                        return
                self._renewed = now
            except ItpnError as error:
                log.warning("the lease %s was not renewed: %s", self._prefix, error)
                pause_s = period_s / 10
            self._stop.wait(pause_s)


class _Watch:
    """Sees whether a holder's beat stands still, by this process's clock."""

    def __init__(self) -> None:
        self._seen: tuple[int, bytes] | None = None
        self._since = 0.0

    def expired(self, prefix: str, holder: Holder) -> bool:
        asked = time.monotonic()  # an answer may take long, and the beat go on meanwhile
        try:
            beat = storage.read_bytes(_uri(prefix, holder.token, "beat"))
        except NotFound:
            beat = b""
        if (holder.token, beat) != self._seen:
            self._seen, self._since = (holder.token, beat), time.monotonic()
        return asked - self._since > holder.ttl_s


def _claim(prefix: str, token: int, owner: str, ttl_s: float) -> Holder | None:
    """Create the tenure; None when another contender has it."""
    pid = os.getpid()
    facts = {
        "id": uuid.uuid4().hex,  # makes the bytes ours alone, so that a retried create is recognised
        "owner": owner,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "pid_started": _process_start(pid),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "ttl_s": ttl_s,
    }
    try:
        storage.write_json_exclusive(_uri(prefix, token, "json"), facts)
    except AlreadyExists:
        return None
    if max(_tokens(prefix)) > token:
        # So slow that later tenures came, and this number was pruned in between.
        storage.delete(_uri(prefix, token, "json"))
        return None
    return _holder(token, facts, released=False, beat_at=time.time())


def holder_of(uri_prefix: str) -> Holder | None:
    """Who holds the lease, as far as can be told without waiting; None when it is free or its holder looks dead."""
    holder = _latest(storage.join(uri_prefix))
    if holder is None or holder.released or holder.known_dead() or holder.looks_dead():
        return None
    return holder


def _latest(prefix: str) -> Holder | None:
    """The holder of the highest tenure, if any."""
    while tokens := _tokens(prefix):
        token = max(tokens)
        try:
            facts = storage.read_json(_uri(prefix, token, "json"))
        except NotFound:
            continue  # pruned since the listing, so there are higher ones
        written = tokens[token]
        return _holder(token, facts, "released" in written, max(written.values()))
    return None


def _holder(token: int, facts: dict, released: bool, beat_at: float) -> Holder:
    facts = {name: value for name, value in facts.items() if name != "id"}
    return Holder(token=token, released=released, beat_at=beat_at, **facts)


def _tokens(prefix: str, deadline_s: float | None = None) -> dict[int, dict[str, float]]:
    """Every tenure there is: the kinds of its objects, and when each was written."""
    tokens: dict[int, dict[str, float]] = {}
    for item in storage.list_files(prefix, deadline_s=deadline_s):
        number, _, kind = item.uri.rpartition("/")[2].partition(".")
        if number.isdigit():
            tokens.setdefault(int(number), {})[kind] = item.mtime
    return {token: kinds for token, kinds in tokens.items() if "json" in kinds}


def _prune(prefix: str, token: int) -> None:
    """Delete the tenures long before `token`; the `.json` last, so that no half of one counts as another."""
    for old in sorted(_tokens(prefix)):
        if old <= token - KEEP_TENURES:
            for kind in ("beat", "released", "json"):
                storage.delete(_uri(prefix, old, kind))


def _uri(prefix: str, token: int, kind: str) -> str:
    return storage.join(prefix, f"{token:08d}.{kind}")


def _machine() -> str:
    """An id inside which process ids are comparable: host, boot, and container (process-id namespace)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _process_start(pid: int) -> float | None:
    """When a process started, to tell it from a later one with its id; None when it is dead.

    On Linux in clock ticks since boot: exact, where the wall-clock time that psutil derives moves with
    every correction of the clock.
    """
    try:
        if not Path("/proc/self/stat").exists():
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, psutil.NoSuchProcess):
        return None
    return None if fields[0] in "ZX" else float(fields[19])


def _clock() -> float:
    """Seconds of a clock that also counts while the machine is suspended, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"
