"""The state of machines and of a recipe's steps, read without changing anything."""

from __future__ import annotations

import sys

from cluster import storage
from cluster.errors import ConfigError, StepFailed
from cluster.lease import holder_of
from cluster.resources import cpu_count
from pipeline.preflight import Requirement
from pipeline.runner import Runner
from pipeline.search import Search
from pipeline.status import State, StepStatus
from pipeline.step import Step
from pipeline.version import library_versions
from pipeline.view import read_progress


def machine(address: str | None) -> list[Requirement]:
    """What every run needs of this machine."""

    def python() -> str:
        if not (3, 11) <= sys.version_info[:2] <= (3, 12):
            raise ConfigError(
                "Python 3.11 or 3.12 is needed",
                found=sys.version.split()[0],
                remedy="make setup with python3.11",
            )
        return sys.version.split()[0]

    def libraries() -> str:
        versions = library_versions()
        missing = sorted({"torch", "deepspeed", "ray", "webdataset", "fsspec", "s3fs"} - versions.keys())
        if missing:
            raise ConfigError("libraries are missing", found=", ".join(missing), remedy="make setup")
        return ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")

    def processors() -> str:
        return f"{cpu_count()} CPUs" + (
            f", Ray at {address}" if address else ", a local Ray is started when needed"
        )

    return [
        Requirement("python", python),
        Requirement("libraries", libraries),
        Requirement("machine", processors),
    ]


def survey(root: str, recipe: str, steps: list[Step], search: Search | None = None) -> list[StepStatus]:
    """Every step's state as storage tells it: done, stopped early, drifted, running (by anyone), failed, or to do."""
    statuses = Runner(root, recipe, steps, search=search).plan()
    for status in statuses:
        if status.state is not State.TODO:
            continue
        output = status.step.output(root)
        holder = holder_of(storage.join(output, "lease"))
        if holder is not None:
            status.state, status.note, status.began = State.RUNNING, str(holder), 0.0
            continue
        failure_uri = storage.join(output, "failure.json")
        if storage.exists(failure_uri):
            failure = storage.read_json(failure_uri)
            status.state = State.FAILED
            status.note = f"{failure['at']} on {failure['host']}"
            status.error = StepFailed(failure["error"])
        elif progress := read_progress(root, status):
            status.note = (
                f"interrupted at {progress['done']}/{progress['total']} {progress['unit']}; run it to go on"
            )
    return statuses
