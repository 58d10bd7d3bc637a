"""How workers learn that they are to save and stop: from Ray's notice of a node, or an order in its key-value store."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster import distributed
from cluster.errors import Stopped, WorkerLost

log = logging.getLogger(__name__)
WATCH_S = 2.0  # between two looks at whether to stop, and two tries to pass an order on
TELL_S = 30.0  # an order that cannot be passed on is told again and again, so far apart
STOP = b"stop"


def stop_key(attempt: str) -> str:
    return f"itpn-stop-{attempt}"


@contextmanager
def heard(spec: dict) -> Iterator[str]:
    """The key in Ray's key-value store at which an order to stop the work of `spec` is looked for.

    While this lasts it is there, empty, for `Session.ask_to_stop` to find, if the work is one that saves.
    """
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    key = stop_key(spec.get("attempt") or uuid.uuid4().hex)
    if "marks" in spec:
        try:
            _internal_kv_put(key, b"")
        except Exception as error:  # the head of the cluster is away
            log.warning("an order to stop would not be heard (%s: %s)", type(error).__name__, error)
    try:
        yield key
    finally:
        try:
            _internal_kv_del(key)
        except Exception as error:  # one small key stays behind; what the work gave must not be lost for it
            log.warning("the mark %s was not removed: %s", key, error)


class StopOrder:
    """Context of a step's task that starts groups: whether they are ordered to stop.

    The order is a mark in Ray's key-value store, which the workers look for. SIGTERM to the task sets it (where the
    task is the main thread, as it is in Ray), and so does who submitted the task (`Session.ask_to_stop`).
    """

    def __init__(self, spec: dict) -> None:
        self._heard, self._seen = heard(spec), False
        self._sigterm, self._ended = threading.Event(), threading.Event()
        self._previous: Any = None
        self._passing_on = threading.Thread(target=self._pass_on, daemon=True)

    def is_given(self) -> bool:
        """Whether the order is given, by either."""
        self._seen = self._seen or self._sigterm.is_set() or _is_marked(self.key)
        return self._seen

    def __enter__(self) -> StopOrder:
        self.key = self._heard.__enter__()
        if threading.current_thread() is threading.main_thread():
            # The handler itself may run inside one of Ray's calls, so that it must make none.
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._sigterm.set())
            self._passing_on.start()
        return self

    def _pass_on(self) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        while not self._sigterm.wait(WATCH_S):
            if self._ended.is_set():
                return
        began = told = time.monotonic()
        while not self._ended.is_set():
            try:
                _internal_kv_put(self.key, STOP)
                return
            except Exception as error:  # the head of the cluster is away for a moment, or for good
                now = time.monotonic()
                if told == began or now - told >= TELL_S:
                    told = now
                    log.error(
                        "the order to stop has not reached the workers for %.0f s (%s: %s); they go on working, and "
                        "it is tried again every %.0f s",
                        now - began, type(error).__name__, error, WATCH_S,
                    )  # fmt: skip
            self._ended.wait(WATCH_S)

    def __exit__(self, *exception: Any) -> None:
        self._ended.set()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._passing_on.join(WATCH_S * 2)  # else it might set the mark after its removal
        self._heard.__exit__(*exception)


def alone(fn: Callable[[dict], dict], spec: dict) -> dict:
    """`fn(spec)` in this process; when its node is taken away, it is WorkerLost with its state saved."""
    import ray

    if not ray.is_initialized():  # a plain process that used the executor for one worker
        return fn(spec)
    try:
        with heard(spec) as key:
            return attended(fn, key, spec)
    except Stopped as error:
        if _leaving():
            raise WorkerLost("the node of the only worker is taken away", found=error.message) from None
        raise


def attended(fn: Callable[[dict], dict], stop_key: str, spec: dict) -> dict:
    """`fn(spec)` in a worker, which is asked to stop when its node is to be taken away or `stop_key` is set."""
    ended = threading.Event()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one on each node; the ranks agree on stopping
        threading.Thread(target=_watch, args=(stop_key, ended), daemon=True).start()
    try:
        return fn(spec)
    finally:
        ended.set()


def _watch(stop_key: str, ended: threading.Event) -> None:
    while not ended.wait(WATCH_S):
        if _leaving() or _is_marked(stop_key):
            distributed.request_stop()


def _is_marked(key: str) -> bool:
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        return _internal_kv_get(key) == STOP
    except Exception as error:  # the head of the cluster is away for a moment
        log.debug("not known whether to stop: %s", error)
        return False


def _leaving() -> bool:
    """Whether Ray takes the node of this process away soon."""
    import ray

    try:
        return ray.get_runtime_context().get_node_id() in draining()
    except Exception as error:  # the head of the cluster is away for a moment
        log.debug("not known whether this node stays: %s", error)
        return False


def draining() -> set[str]:
    """Ids of the nodes that Ray takes away soon (a spot notice, `ray drain-node`, a pod that ends)."""
    from ray._private.state import state  # Ray Train watches the same; there is no public name

    return set(state.get_draining_nodes())
