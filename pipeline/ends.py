"""How steps ended, written down: events in the registry, and a failure beside the step's output."""

from __future__ import annotations

import logging
import traceback
from datetime import UTC, datetime
from typing import Literal

from cluster import storage
from cluster.errors import ItpnError, StepFailed, StorageUnavailable
from pipeline.record import Record
from pipeline.registry import Registry, RunRow
from pipeline.step import Step
from pipeline.version import code_version, host

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # how long the store may take to answer before the end of a step goes untold


class Ends:
    """Writes down how steps ended.

    Args:
        root: URI under which every output lives.
        recipe: the name that run events carry.
    """

    def __init__(self, root: str, recipe: str) -> None:
        self.root, self.recipe = root, recipe

    def publish(self, record: Record) -> None:
        """Write the record's events; an outage here is no failure of the step: the next run publishes them."""
        try:
            Registry(self.root).publish([record])
        except StorageUnavailable as error:
            log.warning("events of %s are not published yet: %s", record.step, error)

    def register(
        self,
        step: Step,
        outcome: Literal["failed", "skipped", "stopped"],
        error: str,
        exit_code: int = 0,
        wall_s: float = 0.0,
    ) -> None:
        """Publish how a step without a record ended; a store that is away makes it a warning.

        Args:
            wall_s: from its start in this run to its end, all attempts and the queueing included.
        """
        try:
            registry = Registry(self.root)
            # Asked first: the step may have failed because the store is away, and that was waited for already.
            storage.list_files(registry.uri, most=1, deadline_s=ANSWER_S)
            registry.publish_run(
                RunRow(
                    run=self.recipe,
                    step=step.id,
                    code_version=code_version(),
                    created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    fingerprint=step.fingerprint,
                    outcome=outcome,
                    error=error,
                    exit_code=exit_code,
                    host=host(),
                    wall_s=round(wall_s, 3),
                )
            )
        except Exception as problem:
            log.warning("that %s %s is not registered: %s", step.id, outcome, problem)

    def write_failure(self, step: Step, error: Exception) -> None:
        """Leave the error in `failure.json` beside the step's output, for `itpn status`."""
        uri = storage.join(step.output(self.root), "failure.json")
        at = datetime.now(UTC).isoformat(timespec="seconds")
        code = error.exit_code if isinstance(error, ItpnError) else 1
        storage.write_telemetry(uri, {"at": at, "error": str(error), "exit_code": code, "host": host()})


def as_ours(step: Step, error: Exception) -> StepFailed:
    """A defect of ours, told like any other failure, with the end of its traceback."""
    text = "".join(traceback.format_exception(error)[-3:])
    return StepFailed(f"'{step.id}' failed", found=text)
