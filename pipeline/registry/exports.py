"""Results for MLflow and TensorBoard, which show them; the registry stays the truth. Exporting again adds nothing.

Each evaluation (a step) becomes one run: a metric `DATASET/SPLIT/METRIC[/VARIANT]` for each of its results, at the
optimiser step of its weights; the configs that they came from are its parameters, their identity its tags.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import ConfigError, PreflightError, StorageRefused
from cluster.lease import Lease
from pipeline.registry.compare import training_config
from pipeline.registry.events import ResultRow
from pipeline.registry.store import Registry

log = logging.getLogger(__name__)

WAIT_S = 600.0  # for another export of the same registry to the same place
METRICS_AT_ONCE = 1000  # the most that MLflow takes in one request
PARAMETERS_AT_ONCE = 100  # the most that MLflow takes in one request
PARAMETER_CHARACTERS = 6000  # the most that it stores of one value


def to_tensorboard(registry: Registry, rows: Sequence[ResultRow], folder: Path) -> int:
    """Write an event file for each evaluation to `folder/STEP/`; returns how many were not there yet.

    A file's name is a hash of its results, so what was exported is recognised; a step with new results gets a new
    file in place of the old one. Raises PreflightError without tensorboard.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
    except ImportError:
        raise _missing("TensorBoard", "tensorboard") from None
    steps, new = _optimiser_steps(registry), 0
    for step, members in _evaluations(rows):
        target = folder / step
        digest = storage.sha256_bytes(" ".join(sorted(row.id for row in members)).encode())[:16]
        file = target / f"events.out.tfevents.{int(_seconds(members[0]))}.{digest}.itpn"
        if not file.exists():
            target.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".itpn-", dir=folder))
            try:
                with SummaryWriter(str(temporary)) as writer:
                    for row in members:
                        at = steps.get(row.checkpoint_sha256, 0)
                        writer.add_scalar(_name(row), row.value, at, walltime=_seconds(row))
                    values = {key: _plain(value) for key, value in training_config(registry, step).items()}
                    for summary in hparams(values, {_name(row): row.value for row in members}):
                        writer.file_writer.add_summary(summary)
                next(temporary.iterdir()).replace(file)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            new += 1
        for other in target.glob("*.itpn"):
            if other != file:
                other.unlink(missing_ok=True)
    return new


def to_mlflow(registry: Registry, rows: Sequence[ResultRow], tracking_uri: str) -> int:
    """Log each evaluation as a run of the experiment that its recipe names; returns how many metrics were new.

    A run is recognised by its tag `itpn.key`, and gets only the metrics that it lacks, so an export that was
    killed is completed by the next. MLflow cannot make a run exclusively, so one export of a registry to the same place
    is at work at a time: a second one waits for up to `WAIT_S`, and then finds everything done.

    Args:
        tracking_uri: `http://…` of a server, or `sqlite:///FILE`.

    Raises PreflightError without mlflow, ConfigError for what MLflow refuses, LeaseHeld when another takes too long.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise _missing("MLflow", "mlflow") from None
    steps, new = _optimiser_steps(registry), 0
    place = storage.sha256_bytes(tracking_uri.encode())[:16]
    lease_uri = storage.join(registry.uri, "export-leases", place)
    with ExitStack() as stack:
        stack.enter_context(_refusals(tracking_uri, MlflowException))
        lease = None
        try:
            lease = stack.enter_context(Lease.acquire(lease_uri, wait_s=WAIT_S))
        except StorageRefused as error:
            log.warning("no other export may be at work: this user may not write leases (%s)", error.message)
        client = MlflowClient(tracking_uri)
        for step, members in _evaluations(rows):
            if lease:
                lease.check()
            run = _mlflow_run(client, registry, step, members)
            lacking = [row for row in members if _name(row) not in run.data.metrics]
            if not lacking and run.info.status == "FINISHED":
                continue
            for part in _parts(lacking, METRICS_AT_ONCE):
                values = [
                    Metric(_name(r), r.value, _milliseconds(r), steps.get(r.checkpoint_sha256, 0))
                    for r in part
                ]
                client.log_batch(run.info.run_id, metrics=values)
            new += len(lacking)
            parameters = [
                Param(_safe(key), str(value)[:PARAMETER_CHARACTERS])
                for key, value in training_config(registry, step).items()
                if _safe(key) not in run.data.params
            ]
            for part in _parts(parameters, PARAMETERS_AT_ONCE):
                client.log_batch(run.info.run_id, params=part)
            client.set_terminated(run.info.run_id, "FINISHED", end_time=_milliseconds(members[-1]))
    return new


@contextmanager
def _refusals(tracking_uri: str, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise ConfigError(
            f"MLflow at {tracking_uri} refuses",
            found=str(error).splitlines()[0],
            remedy="give the http:// address of a server, or sqlite:///FILE",
        ) from error


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _mlflow_run(client: Any, registry: Registry, step: str, members: list[ResultRow]) -> Any:
    """The run of this evaluation; made when there is none."""
    first = members[0]
    key = storage.sha256_bytes(f"{step} {first.checkpoint_sha256} {first.created_at}".encode())[:32]
    experiment = client.get_experiment_by_name(first.run)
    id_ = experiment.experiment_id if experiment else client.create_experiment(first.run)
    if found := client.search_runs([id_], f"tags.`itpn.key` = '{key}'", max_results=1):
        return found[0]
    facts = first.model_dump(mode="json")
    names = ("step", "checkpoint", "checkpoint_sha256", "data_fingerprint", "code_version", "init", "seed")
    tags = {f"itpn.{name}": str(facts[name]) for name in names}
    evaluated = next((r.evaluated_fingerprint for r in members if r.evaluated_fingerprint), "")
    tags |= {"itpn.key": key, "itpn.root": registry.root, "itpn.evaluated_fingerprint": evaluated}
    return client.create_run(id_, start_time=_milliseconds(first), tags=tags, run_name=step)


def _evaluations(rows: Sequence[ResultRow]) -> Iterator[tuple[str, list[ResultRow]]]:
    steps: dict[str, list[ResultRow]] = {}
    for row in rows:
        steps.setdefault(row.step, []).append(row)
    yield from steps.items()


def _optimiser_steps(registry: Registry) -> dict[str, int]:
    return {row.checkpoint.sha256: row.checkpoint.step for row in registry.checkpoints()}


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _name(row: ResultRow) -> str:
    return _safe("/".join(filter(None, (row.dataset, row.split, row.metric, row.variant))))


def _safe(name: str) -> str:
    """With the characters that both take in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _seconds(row: ResultRow) -> float:
    return datetime.fromisoformat(row.created_at).timestamp()


def _milliseconds(row: ResultRow) -> int:
    return int(_seconds(row) * 1000)


def _missing(what: str, extra: str) -> PreflightError:
    return PreflightError(
        f"an export to {what} needs the extra '{extra}'",
        found="it is not installed",
        remedy=f"pip install 'itpn-pipeline[{extra}]'",
    )
