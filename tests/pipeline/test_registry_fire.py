"""The registry with many writers, a store that refuses and loses requests, and writers that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count, islice
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import storage
from cluster.errors import PreflightError
from pipeline.cli import app
from pipeline.registry import Registry, garbage, store
from pipeline.registry.aliases import Aliases
from pipeline.registry.lineage import find
from pipeline.registry.retention import Retention
from pipeline.runner import Runner
from tests.conftest import S3Server
from tests.faulty_s3 import faulty_s3
from tests.pipeline import toys
from tests.pipeline.test_registry_tools import row

WRITERS, APPENDS = 8, 25
RANGE = 10_000  # of numbers that are one writer's own
RATE = 0.1  # of all requests get a 503, or are carried out and never answered


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that share nothing, and start in no time since one that is their parent has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.fixture(params=["local", "seaweedfs", "seaweedfs with faults"])
def any_weather(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A root, and the environment in which other processes reach it."""
    if request.param == "local":
        yield str(tmp_path / "root"), {}
        return
    root: str = request.getfixturevalue("seaweedfs_root")
    server: S3Server = request.getfixturevalue("seaweedfs")
    faults = faulty_s3(server.url, RATE) if "faults" in request.param else nullcontext()
    with faults as proxy:
        yield root, server.env | ({"AWS_ENDPOINT_URL": proxy.url} if proxy else {})
        if proxy:
            assert proxy.seen["503"] and proxy.seen["lost"], proxy.seen


def start(processes: ForkServerContext, work: Any, env: dict[str, str], *arguments: Any) -> BaseProcess:
    process = processes.Process(target=_with_env, args=(env, work, *arguments))
    process.start()
    return process


def _with_env(env: dict[str, str], work: Any, *arguments: Any) -> None:
    os.environ.update(env)
    work(*arguments)


def _append(root: str, writer: int, appends: int | None, acknowledged: str) -> None:
    """Append rows of this writer's own range of numbers: so many, or until the process is killed."""
    with open(acknowledged, "a", buffering=1) as file:
        for number in islice(count(writer * RANGE), appends):
            written = Registry(root).append([("results", row(number))])
            file.write(f"{number} {written}\n")


def _promote(root: str, writer: int, moves: int, acknowledged: str) -> None:
    registry = Registry(root)
    rows = [find(registry, name) for name in ("finetune/a/v1", "finetune/b/v1")]
    with open(acknowledged, "a", buffering=1) as file:
        for number in range(moves):
            alias = Aliases(registry).promote(rows[(writer + number) % 2], "production")
            file.write(alias.current.id + "\n")


def lines(folder: Path) -> list[list[str]]:
    return [line.split() for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_acknowledged_rows_are_the_rows_that_are_read(
    any_weather: tuple[str, dict[str, str]], tmp_path: Path, processes: ForkServerContext
) -> None:
    root, env = any_weather
    (tmp_path / "acknowledged").mkdir()
    writers = [
        start(processes, _append, env, root, n, APPENDS, str(tmp_path / f"acknowledged/{n}"))
        for n in range(WRITERS)
    ]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    told = lines(tmp_path / "acknowledged")
    rows = Registry(root).results()
    wanted = [n * RANGE + i for n in range(WRITERS) for i in range(APPENDS)]
    assert sorted(r.seed for r in rows) == wanted, "none lost, none twice"
    assert sorted(int(number) for number, _ in told) == [r.seed for r in sorted(rows, key=lambda r: r.seed)]
    assert sum(int(written) for _, written in told) == WRITERS * APPENDS, "each was new to exactly one append"


@pytest.mark.slow
def test_killed_writers_lose_nothing_that_was_acknowledged(
    any_weather: tuple[str, dict[str, str]], tmp_path: Path, processes: ForkServerContext
) -> None:
    root, env = any_weather
    chance = random.Random(3)
    for turn in range(2):
        acknowledged = tmp_path / f"acknowledged/{turn}"
        acknowledged.mkdir(parents=True)
        writers = [
            start(processes, _append, env, root, n, None, str(acknowledged / str(n))) for n in range(WRITERS)
        ]
        while sum(path.stat().st_size > 0 for path in acknowledged.iterdir()) < WRITERS:
            time.sleep(0.01)  # until all are at work
        for writer in writers:
            time.sleep(chance.uniform(0, 0.03))
            writer.kill()
        for writer in writers:
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
        seen = [r.seed for r in Registry(root).results()]
        assert len(seen) == len(set(seen)), "none twice"
        assert {int(number) for number, *_ in lines(acknowledged)} <= set(seen), "none lost"
    for n in range(WRITERS):  # the same again, and no killed writer is in the way
        _append(root, n, sum(seed // RANGE == n for seed in seen) + 1, str(tmp_path / "rest"))
    again = [r.seed for r in Registry(root).results()]
    assert len(again) == len(set(again)) == len(seen) + WRITERS, "one new row each"


@pytest.mark.slow
def test_twenty_promotions_from_four_processes_make_one_history(
    any_weather: tuple[str, dict[str, str]], tmp_path: Path, processes: ForkServerContext
) -> None:
    root, env = any_weather
    Runner(root, "toy", toys.chain(), open_session=toys.ThreadSession).run()
    (tmp_path / "acknowledged").mkdir()
    movers = [
        start(processes, _promote, env, root, n, 5, str(tmp_path / f"acknowledged/{n}")) for n in range(4)
    ]
    for mover in movers:
        mover.join()
        assert mover.exitcode == 0
    history = Aliases(Registry(root)).get("production")
    assert history is not None
    told = [line[0] for line in lines(tmp_path / "acknowledged")]
    assert len(set(told)) == 20 and sorted(told) == sorted(move.id for move in history.moves), "no lost move"
    assert storage.list_files(storage.join(root, "registry", "pins")) == []


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_a_store_that_ignores_preconditions_is_refused(
    moto: S3Server, moto_root: str, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    Runner(moto_root, "toy", toys.chain(), open_session=toys.ThreadSession).run()
    registry = Registry(moto_root)
    checkpoint, before = find(registry, "finetune/a/v1"), storage.list_files(moto_root)
    monkeypatch.setattr(store, "_probed", set())  # as another process, which has asked nothing yet
    with faulty_s3(moto.url) as proxy:
        proxy.strip = {header}
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(PreflightError, match="accepted and ignored"):
            registry.append([("results", row(1))])
        with pytest.raises(PreflightError, match="accepted and ignored"):
            Aliases(registry).promote(checkpoint, "production")
        with pytest.raises(PreflightError, match="accepted and ignored"):
            garbage.collect(registry, lambda recipe: Retention())
        assert storage.list_files(moto_root) == before, "nothing was written"
        done = CliRunner().invoke(app, ["doctor", "--root", moto_root, "--json"])
    assert done.exit_code == 2
    checks = json.loads(done.stdout.strip().splitlines()[-1])["checks"]
    root = next(check for check in checks if check["name"] == "root")
    assert not root["ok"] and "ignores conditional writes" in root["text"]
