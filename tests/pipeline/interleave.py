"""Several actors on one store in this process, interleaved at every call of the store by a given schedule.

An actor is a function on a thread of its own; only one runs at a time, from one storage call to the next. So the
real code runs unchanged, and a history is a list of numbers that hypothesis can choose, repeat and shrink.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest

from cluster import storage
from cluster.hashing import sha256_bytes
from cluster.storage import calls, stores


class Killed(BaseException):
    """The actor's process died: nothing of it runs any more, not even what cleans up."""


class MemoryStore:
    """Objects in a dict, with the methods of `cluster.storage.local_files.LocalFiles` that the code here uses."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()  # heartbeats of leases come from threads that no schedule knows

    def stat(self, path: str, timeout_s: float) -> tuple[int, float] | None:
        with self._lock:
            found = self.objects.get(path)
        return (len(found[0]), found[1]) if found else None

    def get(self, path: str, timeout_s: float) -> tuple[bytes, str]:
        with self._lock:
            if path not in self.objects:
                raise FileNotFoundError(path)
            data = self.objects[path][0]
        return data, sha256_bytes(data)

    def create(self, path: str, data: bytes, timeout_s: float) -> None:
        with self._lock:
            if path in self.objects:
                raise FileExistsError(path)
            self.objects[path] = (data, time.time())

    def put(self, path: str, data: bytes, durable: bool = True, *, timeout_s: float) -> None:
        with self._lock:
            self.objects[path] = (data, time.time())

    def put_if(self, path: str, data: bytes, version: str, timeout_s: float) -> bool:
        with self._lock:
            if path not in self.objects or sha256_bytes(self.objects[path][0]) != version:
                return False
            self.objects[path] = (data, time.time())
            return True

    def find(self, path: str, most: int | None, timeout_s: float) -> list[tuple[str, int, float]]:
        with self._lock:
            items = [(p, len(d), at) for p, (d, at) in self.objects.items() if p.startswith(path + "/")]
        return sorted(items)[:most]

    def uploads(self, path: str, timeout_s: float) -> list[tuple[str, str, int, float]]:
        return []

    def delete(self, path: str, timeout_s: float) -> None:
        with self._lock:
            self.objects.pop(path, None)

    def transient(self, error: Exception) -> bool:
        return False

    def missing(self, error: FileNotFoundError) -> bool:
        return True

    def explain(self, error: Exception) -> str | None:
        return None


class InlinePool:
    """A ThreadPoolExecutor that works in the caller's thread, so that its calls are interleaved too."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
        return [function(*items) for items in zip(*iterables, strict=False)]


class Actor:
    """One thread of the play. `result` or `error` is how it ended; `killed` that it was made to."""

    def __init__(self, play: Play, name: str, work: Callable[[], Any], dies_after: int | None) -> None:
        self.name, self.dies_after = name, dies_after
        self.turns = 0
        self.ended = self.killed = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._play, self._work, self._go = play, work, threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """Let it run to its next storage call, or to its end."""
        self.turns += 1
        self.killed = self.killed or (self.dies_after is not None and self.turns > self.dies_after)
        self._go.release()
        assert self._play.back.acquire(timeout=60), f"{self.name} hangs"
        if self.ended:
            self._thread.join()

    def pause(self) -> None:
        """Called in the actor's thread before each storage call."""
        if not self.killed:
            self._play.back.release()
            self._go.acquire()
        if self.killed:
            raise Killed

    def _run(self) -> None:
        self._play.local.actor = self
        self._go.acquire()
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._play.back.release()


class Play:
    """A store, and the actors on it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.store, self.local, self.back = MemoryStore(), threading.local(), threading.Semaphore(0)
        real = calls.call

        def gated(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
            if (actor := getattr(self.local, "actor", None)) is not None:
                actor.pause()
            return real(uri, method, *arguments, **options)

        patch.setattr(stores, "store_of", lambda uri: (self.store, storage.join(uri)))
        patch.setattr(calls, "call", gated)

    def run(
        self,
        actors: dict[str, tuple[Callable[[], Any], int | None]],
        schedule: list[tuple[int, int]],
        check: Callable[[], None],
    ) -> dict[str, Actor]:
        """Run the actors (work, and after how many calls it dies) to their ends.

        `schedule` is (which of those that are left, for how many storage calls); where it ends, each runs to its end.
        `check` is called after every storage call.
        """
        cast = {name: Actor(self, name, *what) for name, what in actors.items()}
        left = list(cast.values())
        for who, turns in [*schedule, *((0, 10**6) for _ in cast)]:
            if not left:
                break
            actor = left[who % len(left)]
            for _ in range(turns):
                actor.turn()
                check()
                if actor.ended:
                    left.remove(actor)
                    break
        assert not left
        return cast


def raw(play: Play, path: str) -> bytes:
    """An object as it is now, past all schedules."""
    with suppress(KeyError):
        return play.store.objects[path][0]
    raise AssertionError(f"{path} is gone")
