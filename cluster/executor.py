"""How a stage gets more than one process, with Ray or without.

A stage never asks which of the two it has: it calls `workers` for ranks that talk to each other and
`map` for independent items. `cluster.jobs.RayExecutor` is the other implementation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import Any, Protocol

from cluster.errors import ConfigError, WorkerLost
from cluster.resources import Resources


class Executor(Protocol):
    """Runs functions for a stage. Functions are module-level; arguments and results are small and picklable."""

    def workers(self, fn: Callable[[dict], dict], spec: dict, resources: Resources) -> dict:
        """Run `fn(spec)` on `resources.workers` ranks at once and return rank 0's result.

        Each rank finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment.
        The first error of any rank is raised, after all ranks have ended.
        """
        ...

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], resources: Resources) -> Iterator[Any]:
        """Yield `fn(item)` as results come, at most `resources.workers` at once (this is the backpressure)."""
        ...


class LocalExecutor:
    """The plain executor: torchrun's ranks when under torchrun, else this process and its children."""

    def workers(self, fn: Callable[[dict], dict], spec: dict, resources: Resources) -> dict:
        if "WORLD_SIZE" in os.environ or resources.workers == 1:
            return fn(spec)
        raise ConfigError(
            f"{resources.workers} ranks were asked for in a plain process",
            expected="torchrun, or Ray",
            found="neither WORLD_SIZE in the environment nor a Ray executor",
            remedy=f"torchrun --nproc-per-node {resources.workers} -m …, or --workers 1",
        )

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], resources: Resources) -> Iterator[Any]:
        if resources.workers <= 1:
            yield from (fn(item) for item in items)
            return
        # spawn: the children make their own object-store clients, which do not survive a fork.
        pool = ProcessPoolExecutor(
            resources.workers, mp_context=get_context("spawn"), initializer=_end_with_parent
        )
        with pool:
            pending: set[Future[Any]] = set()
            try:
                for item in items:
                    pending.add(pool.submit(fn, item))
                    if len(pending) >= resources.workers:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            except BrokenProcessPool:
                raise WorkerLost(
                    "a worker process died",
                    remedy="run again: finished work stays; if it repeats, look for an out-of-memory kill (dmesg)",
                ) from None


def _end_with_parent() -> None:
    """End this process when its parent is gone: after a SIGKILL of the driver, a pool's workers wait for ever."""
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        Thread(target=watch, daemon=True).start()
