"""Worker groups that lose a rank, a node, or their time: on a real Ray, with the loop of a training in small."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest

from cluster.errors import ConfigError, Stopped
from cluster.jobs import RayExecutor, Session, room, stopping
from cluster.resources import Resources, cpu_count

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.close()


def steps(spec: dict) -> dict:
    """Counts steps that all ranks take together; saves when it was asked to stop, and goes on from there."""
    import torch
    import torch.distributed as dist

    from cluster import distributed

    rank, folder = dist.get_rank(), Path(spec["folder"])
    saved = folder / "saved"
    first = step = int(saved.read_text()) if saved.exists() else 0
    (folder / f"rank-{rank}").write_text(f"{os.getpid()} {dist.get_world_size()}")
    (folder / f"started-{spec['attempt']}").touch()
    while step < spec["steps"]:
        total = torch.tensor([1, int(distributed.stop_requested())])
        dist.all_reduce(total)
        step += 1
        time.sleep(0.05)
        if rank == 0:
            (folder / "step").write_text(str(step))
        if total[1]:
            if spec.get("dies_of_the_order"):
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0:
                saved.write_text(str(step))
            raise Stopped(f"stopped after step {step}")
    return {"first": first, "world": dist.get_world_size(), "attempt": spec["attempt"]}


def two(spec: dict) -> dict:
    """In a step's task: a group of two."""
    (Path(spec["folder"]) / "task").write_text(str(os.getpid()))
    return RayExecutor().workers(steps, spec, Resources(workers=2, cpus=0.5))


def under_way(folder: Path, step: int = 10) -> bool:
    path = folder / "step"
    return path.exists() and int(path.read_text() or 0) >= step


def when(condition: Callable[[], bool], act: Callable[[], object]) -> Thread:
    """Do `act` once `condition` holds, beside what the test waits for."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if condition():
                act()
                return
            time.sleep(0.05)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_sigterm_to_the_task_of_a_step_lets_the_ranks_save_first(session: Session, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "steps": 10_000, "attempt": "a", "timeout_s": 60}
    job = session.submit(two, spec, resources=Resources(workers=2), name="two")
    when(lambda: under_way(tmp_path), lambda: os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped after step"):
        job.result()
    assert int((tmp_path / "saved").read_text()) >= 10


def test_asking_the_attempt_of_a_step_lets_its_ranks_save_first(session: Session, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "steps": 10_000, "attempt": "asked", "timeout_s": 60}
    spec |= {"marks": str(tmp_path / "checkpoints")}
    assert not session.ask_to_stop("asked"), "nobody is there yet"
    job = session.submit(two, spec, resources=Resources(workers=2), name="two")
    when(lambda: under_way(tmp_path), lambda: given.append(session.ask_to_stop("asked")))
    given: list[bool] = []
    with pytest.raises(Stopped, match="stopped after step"):
        job.result()
    assert given == [True] and int((tmp_path / "saved").read_text()) >= 10
    assert [path.name for path in tmp_path.glob("started-*")] == ["started-asked"]
    assert not session.ask_to_stop("asked"), "nobody is there any more"


def wait_for_room(spec: dict) -> dict:
    """In a step's task: a group that there is no room for yet."""
    (Path(spec["folder"]) / "task").write_text(str(os.getpid()))
    size = Resources(workers=spec["most"], min_workers=spec["least"], cpus=spec.get("cpus", 0.5))
    return RayExecutor(patience_s=1.0).workers(steps, spec, size)


def asked_of_the_cluster() -> set[int]:
    """The sizes of the groups that wait for room, which an autoscaler would make."""
    from ray.util import placement_group_table

    tables = placement_group_table().values()
    return {len(table["bundles"]) for table in tables if table["state"] == "PENDING"}


@pytest.mark.parametrize(("least", "asked"), [(1000, 1000), (500, 500)], ids=["fixed", "elastic"])
def test_group_that_waits_for_room_asks_for_it_and_hears_sigterm(
    session: Session, tmp_path: Path, least: int, asked: int
) -> None:
    spec = {"folder": str(tmp_path), "most": 1000, "least": least, "attempt": "a"}
    job = session.submit(wait_for_room, spec, resources=Resources(workers=2), name="many")
    when(
        lambda: asked_of_the_cluster() == {asked},
        lambda: os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM),
    )
    with pytest.raises(Stopped, match="stopped before the group was started"):
        job.result()
    assert not list(tmp_path.glob("started-*"))
    assert asked_of_the_cluster() == set(), "nobody waits any more"


def until(condition: Callable[[], object]) -> None:
    """Wait for it; the test's own time limit ends what never comes."""
    while not condition():
        time.sleep(0.05)


def test_elastic_group_that_waited_takes_all_the_room_that_came(session: Session, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "steps": 2, "most": 2, "least": 1, "attempt": "a", "timeout_s": 60}
    spec |= {"cpus": cpu_count() / 2}
    with room.asked_for(1, Resources(cpus=cpu_count()), "others") as placed:
        assert placed(60.0)
        job = session.submit(wait_for_room, spec, resources=Resources(workers=2), name="elastic")
        until(lambda: asked_of_the_cluster() == {1})
    assert job.result()["world"] == 2


@pytest.mark.slow
def test_of_two_groups_that_wait_for_the_same_room_the_one_left_over_hears_an_order(
    session: Session, tmp_path: Path
) -> None:
    jobs = {}
    with room.asked_for(1, Resources(cpus=cpu_count()), "others") as placed:
        assert placed(60.0)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            spec = {"folder": str(tmp_path / name), "steps": 10_000, "most": 2, "least": 2, "attempt": name}
            spec |= {"cpus": cpu_count() / 2, "marks": str(tmp_path / name / "checkpoints"), "timeout_s": 60}
            jobs[name] = session.submit(wait_for_room, spec, resources=Resources(workers=2), name=name)
        until(
            lambda: (
                asked_of_the_cluster() == {2}
                and (tmp_path / "a/task").exists()
                and (tmp_path / "b/task").exists()
            )
        )
    until(lambda: any(under_way(tmp_path / name) for name in jobs))
    [first] = [name for name in jobs if (tmp_path / name / "step").exists()]
    [second] = set(jobs) - {first}
    assert session.ask_to_stop(second)
    with pytest.raises(Stopped, match="stopped before the group was started"):
        jobs[second].result()
    assert session.ask_to_stop(first)
    with pytest.raises(Stopped, match="stopped after step"):
        jobs[first].result()


def test_what_a_killed_task_waited_for_is_given_back(session: Session, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "most": 1000, "least": 1000, "attempt": "killed"}
    spec |= {"marks": str(tmp_path / "checkpoints")}
    job = session.submit(wait_for_room, spec, resources=Resources(workers=2), name="many")
    until(lambda: asked_of_the_cluster() == {1000})
    job.cancel()
    assert session.wait([job], timeout_s=60)
    session.forget("killed")
    until(lambda: asked_of_the_cluster() == set())
    assert not session.ask_to_stop("killed")


def test_room_that_was_asked_for_twice_is_held_once(session: Session) -> None:
    with room.asked_for(1, Resources(cpus=1), "a-step") as placed:
        assert placed(60.0)
        with room.asked_for(1, Resources(cpus=cpu_count()), "a-step") as placed_again:
            assert placed_again(60.0), "what the first holds would not leave room"


def test_worker_lost_after_the_order_to_stop_starts_no_new_group(session: Session, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "steps": 10_000, "attempt": "a", "timeout_s": 60}
    spec |= {"dies_of_the_order": True}
    job = session.submit(two, spec, resources=Resources(workers=2), name="two")
    when(lambda: under_way(tmp_path), lambda: os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM))
    with pytest.raises(Stopped, match="a worker was lost after the order to stop"):
        job.result()
    assert [path.name for path in tmp_path.glob("started-*")] == ["started-a"]


def test_order_to_stop_that_cannot_be_passed_on_is_told_and_tried_again(monkeypatch, caplog) -> None:
    from ray.experimental import internal_kv

    tries: list[bytes] = []

    def put(key: str, value: bytes) -> None:
        assert key == "itpn-stop-a"
        tries.append(value)
        if len(tries) < 3:
            raise RuntimeError("the head is away")

    def delete(key: str) -> None:
        raise RuntimeError("it is away again")

    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", delete)
    monkeypatch.setattr(stopping, "WATCH_S", 0.01)
    with stopping.StopOrder({"attempt": "a"}) as order:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while len(tries) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert order.is_given()
    said = [record.message for record in caplog.records]
    assert sum("has not reached the workers" in text and "the head is away" in text for text in said) == 1
    assert any("was not removed" in text for text in said)


@pytest.mark.slow
def test_rank_that_stands_still_ends_in_a_restart_not_in_a_hang(session: Session, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "steps": 200, "attempt": "a", "timeout_s": 5}
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(int((tmp_path / "rank-1").read_text().split()[0]))
        os.kill(stopped[0], signal.SIGSTOP)

    when(lambda: under_way(tmp_path), stop)
    found = session.submit(two, spec, resources=Resources(workers=2), name="two").result()
    assert stopped and found == {"first": 0, "world": 2, "attempt": "a-1"}
    assert not Path(f"/proc/{stopped[0]}").exists()


def test_elastic_range_must_be_one() -> None:
    assert str(Resources(workers=8, min_workers=2, gpus=1)) == "2 to 8 x (1 CPU + 1 GPU)"
    with pytest.raises(ConfigError, match="cannot have this number of workers"):
        Resources(workers=2, min_workers=3)
