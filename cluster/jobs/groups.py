"""Groups of workers through Ray Train, and streams of tasks: what a stage asks for inside its step's task."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from cluster import scratch
from cluster.errors import Stopped, StorageRefused, StorageUnavailable, WorkerLost
from cluster.jobs import room
from cluster.jobs.session import Job
from cluster.jobs.stopping import StopOrder, alone, attended
from cluster.losses import Restarts, cause_of
from cluster.resources import Resources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayExecutor:
    """`cluster.executor.Executor` on Ray; used inside a step's task.

    `spec` may hold `timeout_s`, the limit on any collective of a group (a slow or dead rank becomes an error, not a
    hang), and `world_sizes`, the numbers of workers, ascending, among which an elastic group chooses.

    A group that lost a worker is started again, and so is one that met a storage outage; any other error of ours
    would only come again, and ends it at once. A single worker is the step's task itself: who submitted the task
    starts it again (`cluster.losses.Restarts` counts for both).

    `spec["marks"]`, the folder of its checkpoints, says that the work saves when it is asked to stop
    (`distributed.request_stop`), and ends with Stopped. A worker is asked when Ray is about to take its node away, and
    every worker when the step's task gets SIGTERM or `Session.ask_to_stop` names its attempt. After a node's notice
    the group is started again here, on the nodes that stay; after an order no group is started any more, and Stopped
    is passed on.

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
            return alone(fn, spec)
        starts, restarts = 0, Restarts(self.max_restarts, spec.get("marks"))
        with StopOrder(spec) as order:
            while True:
                # A late write of a rank that is still dying must not land among the files of its successor.
                again = {"attempt": f"{spec['attempt']}-{starts}"} if starts and "attempt" in spec else {}
                size = self._size(resources, spec, order)
                starts, began = starts + 1, time.monotonic()
                try:
                    return self._group(partial(attended, fn, order.key), spec | again, resources, size)
                except _NoRoom:
                    log.info("the room for %d workers was taken by others; they wait again", size)
                    size = 0  # none of them has run
                except Stopped:
                    if order.is_given():
                        raise
                    log.warning(
                        "the group has saved its state, since a node of it is taken away; it starts again"
                    )
                except WorkerLost as error:
                    if order.is_given():
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
                    if order.is_given() or not restarts.grant(error):
                        raise
                finally:
                    self.worker_seconds.append(size * (time.monotonic() - began))

    def _size(self, resources: Resources, spec: dict, order: StopOrder) -> int:
        """The most workers that can be placed now; waits for the fewest that will do, and asks the cluster for them."""
        fixed = resources.fewest == resources.workers
        sizes = [resources.workers] if fixed else spec.get("world_sizes") or _range(resources)
        began, wanted, told = time.monotonic(), sizes[-1], False
        while True:
            with room.asked_for(wanted, resources, order.key) as placed:
                there = placed(1.0)
                while not there and not order.is_given():
                    if not told and time.monotonic() - began >= self.patience_s:
                        break
                    there = placed(1.0)
                if order.is_given():
                    raise Stopped("stopped before the group was started", remedy="run it again")
                if there and wanted == sizes[-1]:
                    return wanted
                if there:  # more may have come than was asked for; Ray's view of the rest is a moment late
                    time.sleep(1.0)
                count = room.fitting(resources) + (wanted if there else 0)
            fitting = [size for size in sizes if size <= count]
            if fitting:
                log.info("%d of %d workers can be placed", fitting[-1], resources.workers)
                return fitting[-1]
            log.warning("waiting for room: %d of at least %d workers can be placed", count, sizes[0])
            # A cluster that cannot grow to the full size would not grow at all for it.
            wanted, told = sizes[0], True

    def _group(self, fn: Callable[[dict], dict], spec: dict, resources: Resources, size: int) -> dict:
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        # Ray's own watch would restart a group on a node's notice; `stopping.attended` has it saved first.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # There was room a moment ago. Who takes it first is served; the other waits where it hears an order to stop.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
        from ray.train.v2.api.config import FailureConfig
        from ray.train.v2.api.exceptions import TrainingFailedError

        # Restarts are ours (above): Ray would also repeat errors that cannot go away, and wait for room unheard.
        failures = FailureConfig(max_failures=0, controller_failure_limit=0)
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
                    resources_per_worker=room.per_worker(resources),
                ),
                run_config=RunConfig(storage_path=state, failure_config=failures),
            )
            try:
                return cast(Any, trainer.fit()).return_value
            except TrainingFailedError as error:
                if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                    raise _NoRoom from None
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


class _NoRoom(Exception):
    """The room that a group was to start in went to others."""


def _range(resources: Resources) -> range:
    return range(resources.fewest, resources.workers + 1)
