"""A connection to Ray: single tasks, what the cluster has, orders to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from cluster.jobs import room
from cluster.jobs.stopping import STOP, stop_key
from cluster.losses import told
from cluster.resources import Resources, cpu_count

log = logging.getLogger(__name__)


class Session:
    """A connection to a Ray cluster, or a local one that lives as long as this object.

    While it is open SIGTERM raises SystemExit(143) in the main thread, where it was opened there. Ray itself would
    abort the process.

    Args:
        address: `None` starts a local Ray on 127.0.0.1; `auto` or `host:port` joins a running cluster.
    """

    _sigterm: Any = None  # the handler to put back

    def __init__(self, address: str | None = None) -> None:
        import ray

        self._local = address is None
        before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            # An explicit "local" never joins a cluster that happens to run on this machine.
            options |= {
                "address": "local",
                "num_cpus": cpu_count(),
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
            }
        else:
            options["address"] = address
        try:
            _knock(address)
            ray.init(**options)
        except OSError as error:
            raise ConfigError(
                f"no Ray cluster answers at '{address}'",
                found=str(error).splitlines()[0],
                remedy="start one with `ray start --head`, or leave --address out for a local Ray",
            ) from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            self._sigterm = before

    def submit(self, fn: Callable[..., Any], *args: Any, resources: Resources, name: str) -> Job:
        """Start `fn(*args)` as one Ray task in a fresh process.

        A step with one worker runs inside the task and so holds its CPUs and GPUs; a step with more
        workers only waits in the task for the group that it starts, which holds them instead.
        """
        import ray

        inside = resources.workers == 1
        remote = ray.remote(
            num_cpus=resources.cpus if inside else 0,
            num_gpus=resources.gpus if inside else 0,
            max_calls=1,  # training leaves process-wide state behind (process groups, allocator)
            max_retries=0,
        )(fn)
        return Job(remote.options(name=name).remote(*args), name)

    def wait(self, jobs: list[Job], timeout_s: float) -> list[Job]:
        """The jobs that have ended, after at most `timeout_s` seconds."""
        import ray

        ready, _ = ray.wait([job.ref for job in jobs], num_returns=len(jobs), timeout=timeout_s)
        return [job for job in jobs if job.ref in ready]

    def ask_to_stop(self, attempt: str) -> bool:
        """Ask the workers of a step's attempt to save and end (see `RayExecutor`), without waiting for them.

        Returns whether the order is given: False where nobody is there to save (the task has not begun, does work
        that has nothing to save, or has ended), and where the head of the cluster is away, which is logged.
        """
        from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

        try:
            if not _internal_kv_exists(stop_key(attempt)):
                return False
            _internal_kv_put(stop_key(attempt), STOP)
        except Exception as error:
            log.error("the workers were not asked to save and stop: %s: %s", type(error).__name__, error)
            return False
        return True

    def forget(self, attempt: str) -> None:
        """Remove from the cluster what an attempt that was killed could not remove itself."""
        from ray.experimental.internal_kv import _internal_kv_del

        try:
            room.forget(stop_key(attempt))
            _internal_kv_del(stop_key(attempt))
        except Exception as error:  # the head of the cluster is away
            log.warning("%s may still hold room in the cluster: %s: %s", attempt, type(error).__name__, error)

    def capacity(self) -> dict[str, float]:
        """Total resources of the cluster by Ray's names (CPU, GPU, memory, …)."""
        import ray

        return ray.cluster_resources()

    def shortage(self, resources: Resources) -> str | None:
        """What a local Ray has, when that is less than `resources` ask for in all; None when they fit.

        A cluster that was joined may grow, so nothing is said of it.
        """
        if not self._local:
            return None
        total = self.capacity()
        wanted = {"CPU": resources.fewest * resources.cpus, "GPU": resources.fewest * resources.gpus}
        if all(total.get(name, 0.0) >= count for name, count in wanted.items()):
            return None
        return ", ".join(f"{total.get(name, 0.0):g} {name}" for name in wanted) + " in the local Ray"

    def close(self) -> None:
        """Leave the cluster; ends a local Ray and every process of it."""
        import ray

        ray.shutdown()
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)


@dataclass(frozen=True)
class Job:
    """One submitted task."""

    ref: Any
    name: str

    def result(self) -> Any:
        """The task's value; raises the ItpnError it raised, or WorkerLost when its process died."""
        import ray

        try:
            return ray.get(self.ref)
        except ray.exceptions.RayError as error:
            raise told(error, self.name) from None

    def cancel(self) -> None:
        """End the task and its children."""
        import ray

        ray.cancel(self.ref, force=True, recursive=True)


def _knock(address: str | None) -> None:
    """Raise OSError when nothing listens at `host:port`; Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
