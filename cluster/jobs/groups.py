"""Groups of workers through Ray Train, and streams of tasks: what a stage asks for inside its step's task."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from cluster import scratch
from cluster.errors import Stopped, StorageRefused, StorageUnavailable, WorkerLost
from cluster.jobs.session import Job
from cluster.jobs.stopping import StopOrder, alone, attended, draining
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
        sizes = spec.get("world_sizes") or range(resources.fewest, resources.workers + 1)
        wanted, least = (resources.workers,) * 2 if fixed else (sizes[-1], sizes[0])
        began, told = time.monotonic(), False
        place = str(spec.get("marks") or order.key)
        while True:
            with _asked_for(wanted, resources, place) as placed:
                while not placed(1.0):
                    if order.is_given():
                        raise Stopped("stopped while waiting for room", remedy="run it again")
                    if told or time.monotonic() - began < self.patience_s:
                        continue
                    room, told = _room(resources), True
                    fitting = [size for size in sizes if size <= room] if not fixed else []
                    if fitting:
                        log.info("%d of %d workers can be placed", fitting[-1], resources.workers)
                        return fitting[-1]
                    log.warning("waiting for room: %d of at least %d workers can be placed", room, least)
                    if wanted > least:
                        break
                else:
                    if order.is_given():
                        raise Stopped("stopped before the group was started", remedy="run it again")
                    return wanted
            wanted = least  # a cluster that cannot grow to the full size would not grow at all

    def _group(self, fn: Callable[[dict], dict], spec: dict, resources: Resources, size: int) -> dict:
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        # Ray's own watch would restart a group on a node's notice; `stopping.attended` has it saved first.
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


def _room(resources: Resources) -> int:
    """How many workers fit on the nodes that are there to stay, beside what runs on them."""
    from ray._private.state import available_resources_per_node

    wanted = {name: count for name, count in _per_worker(resources).items() if count}
    going, room = draining(), 0
    for node, free in available_resources_per_node().items():
        if node not in going:
            room += min(int(free.get(name, 0.0) / count + 1e-6) for name, count in wanted.items())
    return room


def _per_worker(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})


@contextmanager
def _asked_for(size: int, resources: Resources, place: str) -> Iterator[Callable[[float], bool]]:
    """Ask the cluster for room for `size` workers, so that one which can grow does; the room is free again afterwards.

    Yields whether there is room, a function of the seconds to wait for it.

    Args:
        place: what the room is for. Room that a task asked for which was killed meanwhile is given back first.
    """
    from ray.util import get_placement_group, placement_group, remove_placement_group

    name = f"itpn-room-{place}"
    with suppress(ValueError):  # there is none of this name
        remove_placement_group(get_placement_group(name))
    group = placement_group([_per_worker(resources)] * size, name=name)
    try:
        yield group.wait
    finally:
        remove_placement_group(group)
