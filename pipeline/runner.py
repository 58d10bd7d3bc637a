"""Runs a graph of steps: skips what is done, holds a lease on each running one, retries, collects failures.

The order of the wrappers around a stage's function, outermost first:
done? → lease → done? (another runner may have finished it meanwhile) → plan → task → record → events.
Killing the runner between any two of these loses no finished work: only the record makes a step done.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from cluster import storage
from cluster.errors import (
    AlreadyExists,
    ConfigError,
    DriftError,
    ItpnError,
    LeaseHeld,
    Stopped,
    StorageRefused,
    StorageUnavailable,
    WorkerLost,
)
from cluster.jobs import Job, RayExecutor, Session
from cluster.lease import Lease
from cluster.losses import Restarts
from pipeline import record as records
from pipeline.ends import Ends, as_ours
from pipeline.record import InputRef, Record
from pipeline.registry import Registry
from pipeline.registry.deletions import Deletions
from pipeline.search import Judge, Search, StoppedEarly
from pipeline.status import State, StepStatus
from pipeline.step import Step, topological
from pipeline.version import code_version, host, library_versions
from stages.adopt.config import AdoptConfig
from stages.artifacts import Artifact, CheckpointRef, Outcome
from stages.context import StageContext
from stages.train.layout import CHECKPOINTS

log = logging.getLogger(__name__)

SAVE_S = 60.0  # how long a training may take to save when the run is stopped, before it is ended without
# How long an outage may last before another host's runner may take a step over. On one host a dead runner is
# recognised at once.
LEASE_S = 120.0


_HOPELESS = (State.STOPPED_EARLY, State.BLOCKED)
_NOT_DONE = (State.FAILED, State.STOPPED, State.STOPPED_EARLY, State.BLOCKED)


class Runner:
    """Runs recipes under one root.

    Args:
        root: URI under which every output lives.
        recipe: the name that records and rows carry.
        steps: the graph (inputs are added).
        open_session: connects to Ray; called when the first step has to run, and not at all when none has.
        max_parallel: steps in flight at once.
        wait_for_lease: False raises LeaseHeld instead of waiting for another runner of the same step.
        search: stops hopeless trials early, where it is not off.
        on_change: called with a StepStatus whenever it changes (from several threads).
    """

    def __init__(
        self,
        root: str,
        recipe: str,
        steps: list[Step],
        *,
        open_session: Callable[[], Session] = Session,
        max_parallel: int = 32,
        wait_for_lease: bool = True,
        search: Search | None = None,
        on_change: Callable[[StepStatus], None] = lambda status: None,
    ) -> None:
        self.root, self.recipe = root, recipe
        self.steps = topological(steps)
        self.status = {step.id: StepStatus(step) for step in self.steps}
        self._open_session, self._max_parallel, self._wait = open_session, max_parallel, wait_for_lease
        self._on_change = on_change
        self._search = search if search and search.kind != "off" else None
        self._judge: Judge | None = None
        self._session: Session | None = None
        self._stopping, self._at_once = threading.Event(), threading.Event()
        self._ends = Ends(root, recipe)

    def plan(self) -> list[StepStatus]:
        """The state of every step as storage has it: to do, done, or drifted (with the error)."""
        if self._search:
            self._judge = Judge(self.root, self._search, self.steps)
        with ThreadPoolExecutor(16) as pool:
            for step, found in zip(self.steps, pool.map(self._survey, self.steps), strict=True):
                if isinstance(found, DriftError):
                    self._set(step, State.DRIFTED, error=found)
                elif isinstance(found, str):
                    self._set(step, State.STOPPED_EARLY, note=found)
                elif found is not None:
                    self._set(step, State.DONE, record=found, reused=True)
        for step in self.steps:  # what a hopeless trial was to feed is not to do either
            lost = [s for needed in step.inputs.values() if (s := self.status[needed.id]).state in _HOPELESS]
            if lost and self.status[step.id].state is State.TODO:
                cause = lost[0].blocked_by or lost[0].step.id
                self._set(step, State.BLOCKED, note=f"its input {cause} was stopped early", blocked_by=cause)
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
        if any(status.state is State.TODO for status in self.status.values()):
            # Opened and closed by this thread: the kernel ends a local Ray with the thread that started it.
            self._session = self._open_session()
            try:
                self._refuse_what_never_fits()
                running: dict[Future[Record], Step] = {}
                with ThreadPoolExecutor(self._max_parallel, thread_name_prefix="step") as pool:
                    try:
                        self._loop(pool, running)
                    except BaseException:
                        self._stop(running)
                        raise
            finally:
                self._session.close()
        return list(self.status.values())

    def _refuse_what_never_fits(self) -> None:
        """Raise ConfigError for a step that asks for more than the cluster has; it would wait for ever."""
        assert self._session is not None
        for status in self.status.values():
            shortage = self._session.shortage(status.step.resources)
            if status.state is State.TODO and shortage:
                raise ConfigError(
                    f"'{status.step.id}' asks for more than there is",
                    expected=f"{status.step.resources}",
                    found=shortage,
                    remedy="ask for fewer workers (see --set and the recipe), or join a larger cluster with --address",
                )

    def _stop(self, running: dict[Future[Record], Step]) -> None:
        """End the steps that run, trainings with their state saved; being interrupted again ends them at once."""
        self._stopping.set()
        try:
            while running:
                self._collect(running)
        except BaseException:
            self._at_once.set()
            raise

    def _loop(self, pool: ThreadPoolExecutor, running: dict[Future[Record], Step]) -> None:
        while True:
            for step in self.steps:
                if self.status[step.id].state is State.TODO and step not in running.values():
                    inputs = [self.status[needed.id] for needed in step.inputs.values()]
                    lost = next((s for s in inputs if s.state in _NOT_DONE), None)
                    if lost:
                        self._block(step, lost, pool)
                    elif all(s.state is State.DONE for s in inputs) and len(running) < self._max_parallel:
                        running[pool.submit(self._run_step, step)] = step
            if not running:
                return
            self._collect(running)

    def _collect(self, running: dict[Future[Record], Step]) -> None:
        """Wait until one of the steps ends, and note how."""
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            step = running.pop(future)
            try:
                self._set(step, State.DONE, record=future.result())
            except Stopped as error:
                self._set(step, State.STOPPED, error=error, note=str(error.found or error.message))
            except StoppedEarly as error:
                self._set(step, State.STOPPED_EARLY, note=error.message)
            except ItpnError as error:
                self._set(step, State.FAILED, error=error)

    def _block(self, step: Step, lost: StepStatus, pool: ThreadPoolExecutor) -> None:
        """Skip a step whose input is not done, and register that where the input failed (not: was stopped)."""
        cause = self.status[lost.blocked_by] if lost.blocked_by else lost
        self._set(
            step, State.BLOCKED, note=f"its input {cause.step.id} is not done", blocked_by=cause.step.id
        )
        if cause.state is State.FAILED and not isinstance(cause.error, LeaseHeld):
            reason = cause.error.message.splitlines()[0] if cause.error else ""
            pool.submit(self._ends.register, step, "skipped", f"its input {cause.step.id} failed: {reason}")

    def _run_step(self, step: Step) -> Record:
        """Run a step to its record; a failure is registered, then raised as an ItpnError."""
        began = time.monotonic()
        try:
            return self._hold_and_run(step)
        except (Stopped, LeaseHeld):
            raise  # it goes on later, or with the runner that holds it
        except StoppedEarly as error:
            self._ends.register(step, "stopped", error.message, 0, time.monotonic() - began)
            raise
        except Exception as error:
            failure = error if isinstance(error, ItpnError) else as_ours(step, error)
            self._ends.register(step, "failed", str(failure), failure.exit_code, time.monotonic() - began)
            raise failure from None

    def _hold_and_run(self, step: Step) -> Record:
        def waiting(holder: Any) -> None:
            if self._stopping.is_set():
                raise self._stopped(step)
            self._set(step, State.WAITING, note=f"another runner holds it ({holder})")

        prefix = storage.join(step.output(self.root), "lease")
        with Lease.acquire(prefix, ttl_s=LEASE_S, wait_s=None if self._wait else 0, on_wait=waiting) as lease:
            tries = retries = 0
            marks = storage.join(step.output(self.root), CHECKPOINTS)
            restarts = Restarts(marks=marks)
            while True:
                if (finished := records.load(self.root, step)) is not None:
                    self.status[step.id].reused = tries == 0
                    self._ends.publish(finished)
                    return finished
                if self._stopping.is_set():
                    raise self._stopped(step)
                records.begin(self.root, step)
                tries += 1
                self._set(step, State.RUNNING, note=f"attempt {tries}" if tries > 1 else "")
                try:
                    self._claim_inputs(step)
                    return self._attempt(step, lease)
                except StorageRefused as error:  # no rights, no room: another start would meet it again
                    self._ends.write_failure(step, error)
                    raise
                except (WorkerLost, StorageUnavailable, Stopped) as error:
                    # Asked to stop by somebody else than this runner (a node that is taken away): it resumes.
                    if self._stopping.is_set():
                        raise self._stopped(step, error) from None
                    # A single worker is the task itself: it gets here the restarts that a group gets in its task.
                    alone = step.resources.workers == 1 and not isinstance(error, Stopped)
                    if alone and restarts.grant(error):
                        continue
                    if retries == step.retries:
                        if not isinstance(error, Stopped):  # which has saved and can go on: no failure
                            self._ends.write_failure(step, error)
                        raise
                    retries, restarts = retries + 1, Restarts(marks=marks)
                except StoppedEarly:
                    raise
                except Exception as error:
                    self._ends.write_failure(step, error)
                    raise

    def _claim_inputs(self, step: Step) -> None:
        """Keep gc from the weights that the step needs; its plan, written before, is the reference.

        Raises Deleted when their files are gone: a finished step is never done again by itself.
        """
        artifacts = [self._artifact(needed) for needed in step.inputs.values()]
        weights = [artifact.uri for artifact in artifacts if isinstance(artifact, CheckpointRef)]
        if isinstance(step.config, AdoptConfig) and step.config.uri:
            weights.append(storage.join(step.config.uri))  # may be a checkpoint of this very root
        for uri in weights:
            Deletions(Registry(self.root)).claim(uri, f"{step.id} needs it")

    def _attempt(self, step: Step, lease: Lease) -> Record:
        attempt = uuid.uuid4().hex[:12]
        context = StageContext(
            out=step.output(self.root),
            attempt=attempt,
            executor=RayExecutor(),
            resources=step.resources,
            code_version=code_version(),
        )
        storage.delete(storage.join(context.out, "failure.json"))
        inputs = {name: self._artifact(needed) for name, needed in step.inputs.items()}
        started = datetime.now(UTC)
        wall_s, worker_s, outcome = self._follow(step, lease, inputs, context)
        record = Record(
            step=step.id,
            fingerprint=step.fingerprint,
            identity=step.identity,
            config=step.config.model_dump(mode="json"),
            inputs={n: InputRef(step=s.id, fingerprint=s.fingerprint) for n, s in step.inputs.items()},
            artifact=outcome.artifact,
            files=outcome.files,
            metrics={name: value for name, value in outcome.metrics.items() if math.isfinite(value)},
            notes=outcome.notes,
            recipe=self.recipe,
            attempt=attempt,
            lease_token=lease.token,
            code_version=code_version(),
            libraries=library_versions(),
            host=host(),
            workers=step.resources.workers,
            started_at=started.isoformat(timespec="seconds"),
            finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            wall_s=round(wall_s, 3),
            cpu_seconds=round(worker_s * step.resources.cpus, 3),
            gpu_seconds=round(worker_s * step.resources.gpus, 3),
        )
        lease.check()
        try:
            records.commit(self.root, step, record)
        except AlreadyExists:
            # Somebody finished it after taking the lease from us: theirs counts, ours is an orphan.
            existing = records.load(self.root, step)
            assert existing is not None
            record = existing
        self._ends.publish(record)
        return record

    def _follow(
        self, step: Step, lease: Lease, inputs: dict[str, Artifact], context: StageContext
    ) -> tuple[float, float, Outcome]:
        """Run the stage as a task; returns the seconds it ran (not those it queued), those of all its workers together,
        and its outcome.

        Whatever ends the waiting ends the task: no two attempts of a step are ever alive together.
        """
        assert self._session is not None
        began = time.time()
        job = self._session.submit(
            _execute, step.fn, step.config, inputs, context, resources=step.resources, name=step.id
        )
        try:
            while not self._session.wait([job], timeout_s=1.0):
                if self._stopping.is_set():
                    self._let_save(step, job, context.attempt)
                    break
                if self._judge:
                    self._judge.look(step, began)
                with suppress(StorageUnavailable):  # not known to be lost; asked again before the record
                    lease.check()
            result = job.result()
        except BaseException:
            if not self._session.wait([job], timeout_s=0.0):
                job.cancel()
                self._session.wait([job], timeout_s=30.0)
            self._session.forget(context.attempt)
            raise
        return result["wall_s"], result["worker_s"], Outcome.model_validate(result["outcome"])

    def _let_save(self, step: Step, job: Job, attempt: str) -> None:
        """Have a training save and end by itself; returns when it has ended, in whatever way.

        Raises Stopped, with the reason, when the task is to be ended without a save.
        """
        assert self._session is not None
        if not self._session.ask_to_stop(attempt):
            raise Stopped("it had nothing to save")
        self._set(step, State.RUNNING, note=f"saves its state (at most {SAVE_S:.0f} s)")
        until = time.monotonic() + SAVE_S
        while not self._session.wait([job], timeout_s=1.0):
            if time.monotonic() > until or self._at_once.is_set():
                late = "when it was to end at once" if self._at_once.is_set() else f"after {SAVE_S:.0f} s"
                raise Stopped(f"it had not saved {late}")

    @staticmethod
    def _stopped(step: Step, cause: ItpnError | None = None) -> Stopped:
        return Stopped(
            f"'{step.id}' was stopped",
            found=cause.message if cause else None,
            remedy="run again: it goes on from what it has committed",
        )

    def _artifact(self, step: Step) -> Artifact:
        record = self.status[step.id].record
        assert record is not None, f"{step.id} is an input that has not run"
        return record.artifact

    def _survey(self, step: Step) -> Record | DriftError | str | None:
        """The step's record, what it drifted from, why it was stopped early, or None while it is to do."""
        try:
            record = records.load(self.root, step)
            if record is None:
                records.check_plan(self.root, step)
                return self._judge.stopped(step) if self._judge else None
        except DriftError as error:
            return error
        return record

    def _set(self, step: Step, state: State, **changes: Any) -> None:
        status = self.status[step.id]
        if state is State.RUNNING and status.state is not State.RUNNING:
            status.began = time.time()
        status.state = state
        for name, value in changes.items():
            setattr(status, name, value)
        self._on_change(status)


def _execute(fn: Any, config: Any, inputs: dict[str, Artifact], context: StageContext) -> dict:
    """The body of a step's Ray task."""
    began = time.monotonic()
    outcome = fn(config, inputs, context)
    wall_s = time.monotonic() - began
    # An elastic group may have been of several sizes; without a group all workers were held all the time.
    groups_s = context.executor.worker_seconds if isinstance(context.executor, RayExecutor) else []
    return {
        "wall_s": wall_s,
        "worker_s": sum(groups_s) or wall_s * context.resources.workers,
        "outcome": outcome.model_dump(),
    }
