"""Runs a graph of steps: skips what is done, holds a lease on each running one, retries, collects failures.

The order of the wrappers around a stage's function, outermost first:
done? → lease → done? (another runner may have finished it meanwhile) → plan → task → record → events.
Killing the runner between any two of these loses no finished work: only the record makes a step done.
"""

from __future__ import annotations

import threading
import time
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from cluster import storage
from cluster.errors import AlreadyExists, DriftError, ItpnError, StepFailed, Stopped, StorageUnavailable
from cluster.jobs import RayExecutor, Session
from cluster.lease import Lease
from pipeline import record as records
from pipeline.record import InputRef, Record
from pipeline.registry import Registry
from pipeline.step import Step, topological
from pipeline.version import code_version, host, library_versions
from stages.artifacts import Artifact, Outcome
from stages.context import StageContext


class State(StrEnum):
    TODO = "to do"
    WAITING = "waiting"  # for another runner's lease
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"  # asked to, with its state saved
    BLOCKED = "blocked"  # an input failed
    DRIFTED = "drifted"


@dataclass
class StepStatus:
    """Where one step stands in this run."""

    step: Step
    state: State = State.TODO
    reused: bool = False  # done before this run began
    record: Record | None = None
    error: ItpnError | None = None
    note: str = ""
    began: float = field(default_factory=time.monotonic)


class Runner:
    """Runs recipes under one root.

    Args:
        root: URI under which every output lives.
        recipe: the name that records and rows carry.
        steps: the graph (inputs are added).
        open_session: connects to Ray; called when the first step has to run, and not at all when none has.
        max_parallel: steps in flight at once.
        wait_for_lease: False raises LeaseHeld instead of waiting for another runner of the same step.
        on_change: called with a StepStatus whenever it changes (from several threads).
    """

    def __init__(
        self,
        root: str,
        recipe: str,
        steps: list[Step],
        *,
        open_session: Callable[[], Session] = Session,
        max_parallel: int = 8,
        wait_for_lease: bool = True,
        on_change: Callable[[StepStatus], None] = lambda status: None,
    ) -> None:
        self.root, self.recipe = root, recipe
        self.steps = topological(steps)
        self.status = {step.id: StepStatus(step) for step in self.steps}
        self._open_session, self._max_parallel, self._wait = open_session, max_parallel, wait_for_lease
        self._on_change = on_change
        self._session: Session | None = None
        self._session_lock = threading.Lock()
        self._stopping = threading.Event()

    def plan(self) -> list[StepStatus]:
        """The state of every step as storage has it: to do, done, or drifted (with the error)."""
        with ThreadPoolExecutor(16) as pool:
            for step, found in zip(self.steps, pool.map(self._survey, self.steps), strict=True):
                if isinstance(found, DriftError):
                    self._set(step, State.DRIFTED, error=found)
                elif found is not None:
                    self._set(step, State.DONE, record=found, reused=True)
        return list(self.status.values())

    def run(self) -> list[StepStatus]:
        """Run what is to do; returns every step's final status. Failures are statuses, not exceptions.

        Raises DriftError, before anything runs, when an output was made from another config.
        """
        for status in self.plan():
            if status.state is State.DRIFTED and status.error:
                raise status.error
        # Events of steps that were finished by a run which died before it published them.
        Registry(self.root).publish([s.record for s in self.status.values() if s.record])
        try:
            with ThreadPoolExecutor(self._max_parallel, thread_name_prefix="step") as pool:
                try:
                    self._loop(pool)
                except BaseException:
                    self._stopping.set()
                    raise
        finally:
            if self._session:
                self._session.close()
        return list(self.status.values())

    def _loop(self, pool: ThreadPoolExecutor) -> None:
        running: dict[Future[Record], Step] = {}
        while True:
            for step in self.steps:
                if self.status[step.id].state is State.TODO and step not in running.values():
                    inputs = [self.status[needed.id].state for needed in step.inputs.values()]
                    if any(state in (State.FAILED, State.STOPPED, State.BLOCKED) for state in inputs):
                        self._set(step, State.BLOCKED, note="an input is not done")
                    elif all(state is State.DONE for state in inputs) and len(running) < self._max_parallel:
                        running[pool.submit(self._run_step, step)] = step
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                step = running.pop(future)
                try:
                    self._set(step, State.DONE, record=future.result())
                except Stopped as error:
                    self._set(step, State.STOPPED, error=error, note="run again: it goes on from there")
                except ItpnError as error:
                    self._set(step, State.FAILED, error=error)
                except (
                    Exception
                ) as error:  # a defect of ours: told like any other failure, with its traceback
                    text = "".join(traceback.format_exception(error)[-3:])
                    self._set(step, State.FAILED, error=StepFailed(f"'{step.id}' failed", found=text))

    def _run_step(self, step: Step) -> Record:
        def waiting(holder: Any) -> None:
            if self._stopping.is_set():
                raise self._stopped(step)
            self._set(step, State.WAITING, note=f"another runner holds it ({holder})")

        prefix = storage.join(step.output(self.root), "lease")
        with Lease.acquire(prefix, wait_s=None if self._wait else 0, on_wait=waiting) as lease:
            if (finished := records.load(self.root, step)) is not None:
                self.status[step.id].reused = True
                return finished
            records.begin(self.root, step)
            for attempt in range(step.retries + 1):
                self._set(step, State.RUNNING, note=f"attempt {attempt + 1}" if attempt else "")
                try:
                    return self._attempt(step, lease)
                except (StepFailed, StorageUnavailable) as error:
                    if attempt == step.retries or self._stopping.is_set():
                        self._write_failure(step, error)
                        raise
                except Stopped:
                    raise
                except ItpnError as error:
                    self._write_failure(step, error)
                    raise
        raise AssertionError("unreachable: an attempt returns or raises")

    def _attempt(self, step: Step, lease: Lease) -> Record:
        attempt = uuid.uuid4().hex[:12]
        context = StageContext(
            out=step.output(self.root),
            attempt=attempt,
            executor=RayExecutor(),
            resources=step.resources,
            code_version=code_version(),
        )
        inputs = {name: self._artifact(needed) for name, needed in step.inputs.items()}
        started, clock = datetime.now(UTC), time.monotonic()
        job = self._ray().submit(
            _execute, step.fn, step.config, inputs, context, resources=step.resources, name=step.id
        )
        while not self._ray().wait([job], timeout_s=1.0):
            if self._stopping.is_set():
                job.cancel()
                raise self._stopped(step)
            lease.check()
        outcome = Outcome.model_validate(job.result())
        wall_s = time.monotonic() - clock
        workers = step.resources.workers
        record = Record(
            step=step.id,
            fingerprint=step.fingerprint,
            identity=step.identity,
            config=step.config.model_dump(mode="json"),
            inputs={n: InputRef(step=s.id, fingerprint=s.fingerprint) for n, s in step.inputs.items()},
            artifact=outcome.artifact,
            files=outcome.files,
            metrics=outcome.metrics,
            notes=outcome.notes,
            recipe=self.recipe,
            attempt=attempt,
            lease_token=lease.token,
            code_version=code_version(),
            libraries=library_versions(),
            host=host(),
            workers=workers,
            started_at=started.isoformat(timespec="seconds"),
            finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            wall_s=round(wall_s, 3),
            cpu_seconds=round(wall_s * workers * step.resources.cpus, 3),
            gpu_seconds=round(wall_s * workers * step.resources.gpus, 3),
        )
        lease.check()
        try:
            records.commit(self.root, step, record)
        except AlreadyExists:
            # Somebody finished it after taking the lease from us: theirs counts, ours is an orphan.
            existing = records.load(self.root, step)
            assert existing is not None
            record = existing
        Registry(self.root).publish([record])
        return record

    @staticmethod
    def _stopped(step: Step) -> Stopped:
        return Stopped(f"'{step.id}' was stopped", remedy="run again: it goes on from what it has committed")

    def _artifact(self, step: Step) -> Artifact:
        record = self.status[step.id].record
        assert record is not None, f"{step.id} is an input that has not run"
        return record.artifact

    def _ray(self) -> Session:
        with self._session_lock:
            if self._session is None:
                self._session = self._open_session()
            return self._session

    def _survey(self, step: Step) -> Record | DriftError | None:
        try:
            record = records.load(self.root, step)
            if record is None:
                records.check_plan(self.root, step)
        except DriftError as error:
            return error
        return record

    def _set(self, step: Step, state: State, **changes: Any) -> None:
        status = self.status[step.id]
        if state is State.RUNNING and status.state is not State.RUNNING:
            status.began = time.monotonic()
        status.state = state
        for name, value in changes.items():
            setattr(status, name, value)
        self._on_change(status)

    def _write_failure(self, step: Step, error: ItpnError) -> None:
        uri = storage.join(step.output(self.root), "failure.json")
        at = datetime.now(UTC).isoformat(timespec="seconds")
        storage.write_telemetry(
            uri, {"at": at, "error": str(error), "exit_code": error.exit_code, "host": host()}
        )


def _execute(fn: Any, config: Any, inputs: dict[str, Artifact], context: StageContext) -> dict:
    """The body of a step's Ray task."""
    return fn(config, inputs, context).model_dump(mode="json")


def exit_code(statuses: list[StepStatus]) -> int:
    """0 when nothing failed (a requested stop is no failure), else the code of the first failure."""
    return next((s.error.exit_code for s in statuses if s.error and s.error.exit_code), 0)
