"""Tasks, streams of tasks and worker groups on a real local Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError, DataInvalid, StepFailed, WorkerLost
from cluster.jobs import RayExecutor, Session
from cluster.resources import Resources

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.close()


def add(a: int, b: int) -> int:
    return a + b


def refuse() -> None:
    raise DataInvalid("a shard is broken", expected="sha a", found="sha b", remedy="shard again")


def stumble() -> None:
    raise ValueError("seven is no colour")


def vanish() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spread(count: int) -> list[int]:
    return sorted(RayExecutor().map(_square, range(count), Resources(workers=2, cpus=0.1)))


def _square(x: int) -> int:
    return x * x


def group(spec: dict) -> dict:
    """In a task: a worker group of two, as the pretrain stage starts it."""
    return RayExecutor().workers(_rank, spec | {"timeout_s": 60}, Resources(workers=2, cpus=0.5))


ERRORS: dict[str, Exception] = {
    "data": DataInvalid("rank 1 met a broken shard", remedy="verify the data set"),
    "disk": StepFailed("rank 1 could not write the checkpoint", found="No space left on device"),
    "defect": ValueError("seven is no colour"),
}


def _rank(spec: dict) -> dict:
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    marker = Path(spec["folder"]) / "died"
    if spec.get("die") and rank == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.get("refuse") and rank == 1:
        with (Path(spec["folder"]) / "tries").open("a") as file:
            file.write("x")
        raise ERRORS[spec["refuse"]]
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return {"rank": rank, "sum": total.item(), "world": dist.get_world_size()}


def test_task_returns_its_value(session: Session) -> None:
    job = session.submit(add, 1, 2, resources=Resources(), name="add")
    deadline = time.monotonic() + 60
    while not session.wait([job], timeout_s=1.0):
        assert time.monotonic() < deadline
    assert job.result() == 3


def test_our_error_crosses_the_border_whole(session: Session) -> None:
    with pytest.raises(DataInvalid, match="a shard is broken") as caught:
        session.submit(refuse, resources=Resources(), name="refuse").result()
    assert (caught.value.expected, caught.value.found, caught.value.remedy) == (
        "sha a",
        "sha b",
        "shard again",
    )


def test_foreign_error_keeps_its_text(session: Session) -> None:
    with pytest.raises(StepFailed, match="seven is no colour"):
        session.submit(stumble, resources=Resources(), name="stumble").result()


def test_killed_task_is_an_error_with_a_remedy(session: Session) -> None:
    with pytest.raises(WorkerLost, match="'vanish' died"):
        session.submit(vanish, resources=Resources(), name="vanish").result()


def test_map_yields_every_result(session: Session) -> None:
    assert session.submit(spread, 7, resources=Resources(), name="map").result() == [0, 1, 4, 9, 16, 25, 36]


def test_worker_group_reduces_and_returns_rank_0(session: Session, tmp_path: Path) -> None:
    job = session.submit(group, {"folder": str(tmp_path)}, resources=Resources(workers=2), name="group")
    assert job.result() == {"rank": 0, "sum": 3.0, "world": 2}


def test_killed_rank_restarts_the_group(session: Session, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "die": True}
    assert session.submit(group, spec, resources=Resources(workers=2), name="group").result()["sum"] == 3.0
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        ("data", DataInvalid, "rank 1 met a broken shard"),
        ("disk", StepFailed, "rank 1 could not write the checkpoint(.|\n)*No space left"),
        ("defect", StepFailed, "seven is no colour"),
    ],
)
def test_error_that_a_rank_raised_itself_ends_the_step_at_once(session, tmp_path, error, kind, text) -> None:
    spec = {"folder": str(tmp_path), "refuse": error}
    with pytest.raises(kind, match=text) as caught:
        session.submit(group, spec, resources=Resources(workers=2), name="group").result()
    assert type(caught.value) is kind
    assert (tmp_path / "tries").read_text() == "x"


def test_absent_cluster_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        Session("127.0.0.1:1")
