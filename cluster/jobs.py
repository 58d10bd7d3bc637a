"""Run functions on Ray: single tasks, streams of tasks, and worker groups through Ray Train.

The only importer of ray, and lazily, so that everything else runs where Ray is not installed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from cluster import distributed, scratch
from cluster.errors import ConfigError, Stopped, StorageRefused, StorageUnavailable, WorkerLost
from cluster.losses import Restarts, cause_of, told
from cluster.resources import Resources, cpu_count

log = logging.getLogger(__name__)
_WATCH_S = 2.0  # between two looks at whether to stop, and two tries to pass an order on
_TELL_S = 30.0  # an order that cannot be passed on is told again and again, so far apart


class Session:
    """A connection to a Ray cluster, or a local one that lives as long as this object.

    Args:
        address: `None` starts a local Ray on 127.0.0.1; `auto` or `host:port` joins a running cluster.
    """

    def __init__(self, address: str | None = None) -> None:
        import ray

        self._local = address is None
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


@dataclass(frozen=True)
class RayExecutor:
    """`cluster.executor.Executor` on Ray; used inside a step's task.

    `spec` may hold `timeout_s`, the limit on any collective of a group (a slow or dead rank becomes an error, not a
    hang), and `world_sizes`, the numbers of workers, ascending, among which an elastic group chooses.

    A group that lost a worker is started again, and so is one that met a storage outage; any other error of ours
    would only come again, and ends it at once. A single worker is the step's task itself: who submitted the task
    starts it again (`cluster.losses.Restarts` counts for both).

    A worker whose node Ray is about to take away, and every worker when the step's task gets SIGTERM, is asked to
    stop (`distributed.request_stop`): training saves and ends with Stopped. After a node's notice the group is started
    again here, on the nodes that stay; after SIGTERM no group is started any more, and Stopped is passed on.

    Args:
        max_restarts: how often in a row a group is started again; a new file in the folder `spec["marks"]` ends a row.
        patience_s: how long an elastic group waits for its full size where a smaller one could start.
        worker_seconds: of each group so far, its workers times the seconds from its start to its end.
    """

    max_restarts: int = Restarts.most
    patience_s: float = 30.0
    worker_seconds: list[float] = field(default_factory=list)

    def workers(self, fn: Callable[[dict], dict], spec: dict, resources: Resources) -> dict:
        if resources.workers == 1:
            return _alone(fn, spec)
        starts, restarts = 0, Restarts(self.max_restarts, spec.get("marks"))
        with _StopOrder() as order:
            while True:
                # A late write of a rank that is still dying must not land among the files of its successor.
                again = {"attempt": f"{spec['attempt']}-{starts}"} if starts and "attempt" in spec else {}
                size = self._size(resources, spec, order)
                if order.given.is_set():
                    raise Stopped("stopped before the group was started", remedy="run it again")
                starts, began = starts + 1, time.monotonic()
                try:
                    return self._group(partial(_attended, fn, order.key), spec | again, resources, size)
                except Stopped:
                    if order.given.is_set():
                        raise
                    log.warning(
                        "the group has saved its state, since a node of it is taken away; it starts again"
                    )
                except WorkerLost as error:
                    if order.given.is_set():
                        raise Stopped(
                            "a worker was lost after the order to stop; what was committed before is kept",
                            found=error.found,
                            remedy="run it again: it goes on from the last checkpoint",
                        ) from None
                    if not restarts.grant(error):
                        raise
                except StorageRefused:
                    raise  # no rights, no room: another start would meet it again
                except StorageUnavailable as error:
                    if order.given.is_set() or not restarts.grant(error):
                        raise
                finally:
                    self.worker_seconds.append(size * (time.monotonic() - began))

    def _size(self, resources: Resources, spec: dict, order: _StopOrder) -> int:
        """The most workers that can be placed now; waits for the fewest that will do."""
        if resources.fewest == resources.workers:
            return resources.workers  # Ray waits for the room itself
        sizes = spec.get("world_sizes") or range(resources.fewest, resources.workers + 1)
        began, told = time.monotonic(), False
        while True:
            room = _room(resources)
            fitting = [size for size in sizes if size <= room]
            waited_s = time.monotonic() - began
            if fitting and (fitting[-1] == sizes[-1] or waited_s >= self.patience_s):
                log.info("%d of %d workers can be placed", fitting[-1], resources.workers)
                return fitting[-1]
            if not fitting and waited_s >= self.patience_s and not told:
                told = True
                log.warning("waiting for room: %d of at least %d workers can be placed", room, sizes[0])
            if order.given.wait(1.0):
                raise Stopped("stopped while waiting for room", remedy="run it again")

    def _group(self, fn: Callable[[dict], dict], spec: dict, resources: Resources, size: int) -> dict:
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        # Ray's own watch would restart a group on a node's notice; `_attended` has it saved first.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.config import FailureConfig
        from ray.train.v2.api.exceptions import TrainingFailedError

        elastic = resources.fewest < resources.workers
        # What an elastic group was promised may be gone again: then its size is decided anew, here.
        failures = FailureConfig(max_failures=0, controller_failure_limit=0 if elastic else -1)
        per_worker = _per_worker(resources)
        with tempfile.TemporaryDirectory(prefix="ray-train-", dir=scratch.folder()) as state:
            trainer = TorchTrainer(
                cast(
                    Any, fn
                ),  # Ray's annotation says that nothing is returned; `return_value` says otherwise
                train_loop_config=spec,
                torch_config=TorchConfig(
                    backend="nccl" if resources.gpus else "gloo", timeout_s=int(spec.get("timeout_s", 600))
                ),
                scaling_config=ScalingConfig(
                    num_workers=size,
                    use_gpu=bool(resources.gpus),
                    resources_per_worker=per_worker,
                ),
                # Restarts are ours (above): Ray would also repeat errors that cannot go away.
                run_config=RunConfig(storage_path=state, failure_config=failures),
            )
            try:
                return cast(Any, trainer.fit()).return_value
            except TrainingFailedError as error:
                raise cause_of(getattr(error, "worker_failures", None) or {}, str(error)) from None

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], resources: Resources) -> Iterator[Any]:
        import ray

        remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=self.max_restarts)(
            fn
        )
        pending: list[Any] = []
        for item in items:
            pending.append(remote.remote(item))
            if len(pending) >= resources.workers:
                yield from self._take(pending)
        while pending:
            yield from self._take(pending)

    @staticmethod
    def _take(pending: list[Any]) -> Iterator[Any]:
        import ray

        done, rest = ray.wait(pending, num_returns=1)
        pending[:] = rest
        for ref in done:
            yield Job(ref, "a task of the step").result()


def publish_gauges(values: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Set Prometheus gauges (`ray_itpn_<name>`, labels `tags`) that Ray's node agents export; does nothing outside Ray.

    The same name must always come with the same keys of `tags`.
    """
    ray = sys.modules.get("ray")  # where Ray runs this process it is imported already
    if ray is None or not ray.is_initialized():
        return
    from ray.util.metrics import Gauge

    for name, value in values.items():
        if name not in _gauges:
            _gauges[name] = Gauge(f"itpn_{name}", f"{name} of a run", tag_keys=tuple(tags))
        _gauges[name].set(float(value), dict(tags))


_gauges: dict[str, Any] = {}


class _StopOrder:
    """Context of a step's task: SIGTERM to it becomes a mark in Ray's key-value store, which the workers look for.

    Where the task is not the main thread (it is in Ray), the context does nothing.
    """

    def __init__(self) -> None:
        self.key, self.given = f"itpn-stop-{uuid.uuid4().hex}", threading.Event()

    def __enter__(self) -> _StopOrder:
        self._previous: Any = None
        self._ended = threading.Event()
        if threading.current_thread() is threading.main_thread():
            # The handler itself may run inside one of Ray's calls, so that it must make none.
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self.given.set())
            threading.Thread(target=self._pass_on, daemon=True).start()
        return self

    def _pass_on(self) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        while not self.given.wait(_WATCH_S):
            if self._ended.is_set():
                return
        began = told = time.monotonic()
        while not self._ended.is_set():
            try:
                _internal_kv_put(self.key, b"")
                return
            except Exception as error:  # the head of the cluster is away for a moment, or for good
                now = time.monotonic()
                if told == began or now - told >= _TELL_S:
                    told = now
                    log.error(
                        "the order to stop has not reached the workers for %.0f s (%s: %s); they go on working, and "
                        "it is tried again every %.0f s",
                        now - began, type(error).__name__, error, _WATCH_S,
                    )  # fmt: skip
            self._ended.wait(_WATCH_S)

    def __exit__(self, *_: object) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        self._ended.set()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        try:
            _internal_kv_del(self.key)
        except Exception as error:  # one small key stays behind; what the group gave must not be lost for it
            log.warning("the mark %s was not removed: %s", self.key, error)


def _alone(fn: Callable[[dict], dict], spec: dict) -> dict:
    """`fn(spec)` in this process; when its node is taken away, it is WorkerLost with its state saved."""
    try:
        return _attended(fn, None, spec)
    except Stopped as error:
        if _leaving():
            raise WorkerLost("the node of the only worker is taken away", found=error.message) from None
        raise


def _attended(fn: Callable[[dict], dict], stop_key: str | None, spec: dict) -> dict:
    """`fn(spec)` in a worker, which is asked to stop when its node is to be taken away or `stop_key` is set."""
    ended = threading.Event()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one on each node; the ranks agree on stopping
        threading.Thread(target=_watch, args=(stop_key, ended), daemon=True).start()
    try:
        return fn(spec)
    finally:
        ended.set()


def _watch(stop_key: str | None, ended: threading.Event) -> None:
    import ray
    from ray.experimental.internal_kv import _internal_kv_exists

    if not ray.is_initialized():  # a plain process that used the executor for one worker
        return
    while not ended.wait(_WATCH_S):
        try:
            if _leaving() or (stop_key and _internal_kv_exists(stop_key)):
                distributed.request_stop()
        except Exception as error:  # the head is away for a moment
            log.debug("not known whether to stop: %s", error)


def _leaving() -> bool:
    """Whether Ray takes the node of this process away soon."""
    import ray

    try:
        return ray.is_initialized() and ray.get_runtime_context().get_node_id() in _draining()
    except Exception as error:  # the head of the cluster is away for a moment
        log.debug("not known whether this node stays: %s", error)
        return False


def _draining() -> set[str]:
    """Ids of the nodes that Ray takes away soon (a spot notice, `ray drain-node`, a pod that ends)."""
    from ray._private.state import state  # Ray Train watches the same; there is no public name

    return set(state.get_draining_nodes())


def _room(resources: Resources) -> int:
    """How many workers fit on the nodes that are there to stay, beside what runs on them."""
    from ray._private.state import available_resources_per_node

    wanted = {name: count for name, count in _per_worker(resources).items() if count}
    going, room = _draining(), 0
    for node, free in available_resources_per_node().items():
        if node not in going:
            room += min(int(free.get(name, 0.0) / count + 1e-6) for name, count in wanted.items())
    return room


def _per_worker(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})


def _knock(address: str | None) -> None:
    """Raise OSError when nothing listens at `host:port`; Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
