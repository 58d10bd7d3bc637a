"""A toy stage that does real, countable work, and a session that runs it in a thread instead of a Ray task."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from cluster import storage
from cluster.errors import DataInvalid
from cluster.resources import Resources
from pipeline.record import Record
from pipeline.step import Step
from stages.artifacts import Artifact, CheckpointRef, EvaluationRef, FileInfo, Measurement, Outcome
from stages.config import Config, not_identity
from stages.context import StageContext

CALLS: list[str] = []
_lock = threading.Lock()


class ToyConfig(Config):
    value: float = 1.0
    seed: int = 0
    init: str = "scratch"
    fail: str = not_identity("")
    workers: int = not_identity(1)
    calls: str = not_identity("")  # folder in which every call leaves a file, for calls in other processes

    def objective(self) -> dict[str, Any]:
        return {}


def train(config: ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
    with _lock:
        CALLS.append(context.out)
    if config.calls:
        name = "-".join(context.out.split("/")[-3:-1])
        storage.write_exclusive(storage.join(config.calls, name, context.attempt), b"")
    if config.fail == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.fail == "after a checkpoint":
        storage.write_exclusive(storage.join(context.out, "checkpoints", "1.json"), b"{}")
        raise DataInvalid("toy data ended")
    if config.fail == "ours":
        raise DataInvalid("toy data are broken", expected="good", found="bad", remedy="mend them")
    if config.fail == "theirs":
        raise ValueError("a bug")
    data = str(config.value).encode()
    uri = storage.join(context.files, "weights")
    storage.write_exclusive(uri, data)
    digest = hashlib.sha256(data).hexdigest()
    reference = CheckpointRef(
        uri=uri, sha256=digest, bytes=len(data), step=1, task="classify", dataset="toy", data_fingerprint="d" * 64,
        seed=config.seed, init=config.init, pretrain="p" if config.init == "pretrained" else None,
    )  # fmt: skip
    files = [FileInfo(path=uri.removeprefix(context.out + "/"), bytes=len(data), sha256=digest)]
    return Outcome(artifact=reference, files=files, metrics={"loss": config.value})


def train_from(config: ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
    """`train` that reads the weights it starts from, as fine-tuning does."""
    if "init" in inputs:
        storage.read_bytes(inputs["init"].uri)
    outcome = train(config, inputs, context)
    task = "classify" if "init" in inputs else "pretrain"
    return outcome.model_copy(update={"artifact": outcome.artifact.model_copy(update={"task": task})})


def evaluate(config: ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
    with _lock:
        CALLS.append(context.out)
    checkpoint = inputs["checkpoint"]
    value = float(storage.read_bytes(checkpoint.uri))
    reference = EvaluationRef(
        dataset="toy", split="val", samples=10, data_fingerprint="e" * 64,
        evaluator=config.identity(), checkpoint=checkpoint,
        measurements=[Measurement(metric="top1", value=value), Measurement(metric="loss", value=-value)],
    )  # fmt: skip
    return Outcome(artifact=reference, files=[], metrics={"top1": value})


def chain(fail: str = "", value: float = 3.0, version: str = "v1") -> list[Step]:
    """train/a -> evaluate/a and train/b -> evaluate/b; `fail` breaks train/a."""
    steps = []
    for name, init, broken in (("a", "pretrained", fail), ("b", "scratch", "")):
        trained = Step(
            kind="finetune", name=name, version=version, fn=train, retries=1,
            config=ToyConfig(value=value if init == "pretrained" else 1.0, init=init, fail=broken),
        )  # fmt: skip
        steps.append(
            Step(
                kind="evaluate",
                name=name,
                version=version,
                fn=evaluate,
                config=ToyConfig(),
                inputs={"checkpoint": trained},
            )
        )
    return steps


class ThreadJob:
    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def result(self) -> Any:
        return self.future.result()

    def cancel(self) -> None:
        self.future.cancel()


class ThreadSession:
    """The part of `cluster.jobs.Session` that the runner uses."""

    opened = 0

    def __init__(self) -> None:
        type(self).opened += 1
        self._pool = ThreadPoolExecutor(8)

    def submit(self, fn: Callable[..., Any], *args: Any, resources: Resources, name: str) -> ThreadJob:
        return ThreadJob(self._pool.submit(fn, *args))

    def wait(self, jobs: list[ThreadJob], timeout_s: float) -> list[ThreadJob]:
        for job in jobs:
            try:
                job.future.exception(timeout_s)
            except TimeoutError:
                continue
        return [job for job in jobs if job.future.done()]

    def ask_to_stop(self, attempt: str) -> bool:
        return False  # toys have nothing to save

    def forget(self, attempt: str) -> None:
        pass  # a thread leaves nothing in a cluster

    def shortage(self, resources: Resources) -> str | None:
        return "1 CPU" if resources.workers > 64 else None

    def close(self) -> None:
        self._pool.shutdown()


def replace_function(step: Step, fn: Callable[..., Outcome]) -> Step:
    """The step with another function under the same name, so with the same identity."""
    fn.__module__, fn.__qualname__ = step.fn.__module__, step.fn.__qualname__
    return replace(step, fn=fn)


def finished(step: Step, artifact: Artifact | None = None) -> Record:
    """The record of a step that no runner ran."""
    weights = CheckpointRef(
        uri="x", sha256="0" * 64, bytes=1, step=1, task="classify", dataset="d", data_fingerprint="d", seed=0
    )
    return Record(
        step=step.id, fingerprint=step.fingerprint, identity=step.identity, inputs={}, artifact=artifact or weights,
        files=[], config=step.config.model_dump(mode="json"), metrics={}, notes=[], recipe="evaluate", attempt="a",
        lease_token=1, code_version="c", libraries={}, host="h", workers=1, started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:00:00+00:00", wall_s=1.0, cpu_seconds=1.0, gpu_seconds=0.0,
    )  # fmt: skip
