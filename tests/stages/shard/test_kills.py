"""SIGKILL of a worker or of the driver at any instant: a rerun completes the data set, byte for byte."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil
import pytest

from cluster import storage
from cluster.executor import LocalExecutor
from cluster.resources import Resources
from stages.artifacts import DatasetRef
from stages.context import Progress, StageContext
from stages.data.manifest import load_manifest, resolve
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from stages.shard.ustar import TarWriter
from tests.stages.images import write_image_folder

_FORK = multiprocessing.get_context("fork")


class _Forked(LocalExecutor):
    """Processes of the local executor, forked: a local store has no clients that a fork could break."""

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], resources: Resources) -> Iterator[Any]:
        with ProcessPoolExecutor(resources.workers, mp_context=_FORK) as pool:
            yield from pool.map(fn, items)


def _config(source: Path) -> ShardConfig:
    return ShardConfig(name="killed", source=str(source), shard_samples=6)


def _drive(source: Path, out: Path, kill: Kill) -> None:
    os.setsid()
    kill.install()
    context = StageContext(out=str(out), executor=_Forked(), resources=Resources(workers=2))
    run(_config(source), {}, context)


def _finish(source: Path, out: Path) -> DatasetRef:
    artifact = run(_config(source), {}, StageContext(out=str(out))).artifact
    assert isinstance(artifact, DatasetRef)
    return artifact


def _files(ref: DatasetRef) -> dict[str, bytes]:
    """Shards and indices by name."""
    manifest = load_manifest(ref.manifest)
    found = {}
    for name, split in manifest.splits.items():
        for label, path in [(f"{name} index", split.index.path), *((s.name, s.path) for s in split.shards)]:
            found[label] = Path(resolve(ref.manifest, manifest, path)).read_bytes()
    return found


class Kill(NamedTuple):
    """SIGKILL of one kind of process at its n-th call of a function, before or after it."""

    victim: str  # "driver" or "worker"
    owner: Any
    function: str
    call: int
    after: bool

    def install(self) -> None:
        """In the driver, before it forks its workers."""
        driver, calls, function = os.getpid(), count(1), getattr(self.owner, self.function)

        def watched(*args: Any, **options: Any) -> Any:
            due = (os.getpid() == driver) == (self.victim == "driver") and next(calls) == self.call
            if due and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(self.owner, self.function, watched)


def _seeded_kills() -> list[Kill]:
    """Ten of a worker (inside a shard, at its publication, at its record), ten of the driver (between tasks, at
    either index, at the manifest)."""
    random = Random(4)
    of_workers = [
        (TarWriter, "add_pair", 90),
        (storage, "move_file", 16),
        (storage, "write_json_exclusive", 16),
    ]
    of_driver = [(Progress, "update", 9), (storage, "upload_file", 2), (storage, "write_json_exclusive", 1)]
    return [
        Kill(victim, owner, function, random.randint(1, most), random.random() < 0.5)
        for victim, places in (("worker", of_workers), ("driver", of_driver))
        for owner, function, most in (places * 4)[:10]
    ]


@pytest.mark.slow
def test_kills_at_twenty_seeded_instants_change_no_byte(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in", classes=3, train=60, val=4)
    reference = _files(_finish(source, tmp_path / "whole"))
    for trial, kill in enumerate(_seeded_kills()):
        out = tmp_path / str(trial)
        driver = _FORK.Process(target=_drive, args=(source, out, kill))
        driver.start()
        if trial % 4:
            driver.join()  # without a limit: the orphans hold the pipe that a limited wait watches
            ref = _finish(source, out)
        else:
            while psutil.Process(driver.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.002)
            ref = _finish(source, out)  # the workers of a killed driver may go on writing meanwhile
            driver.join()
        assert driver.exitcode == (-signal.SIGKILL if kill.victim == "driver" else 1), f"{trial}: {kill}"
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        assert _files(ref) == reference, f"{trial}: {kill}"


@pytest.mark.slow
def test_a_killed_driver_on_ray_loses_nothing_that_was_written(tmp_path: Path) -> None:
    source, out = write_image_folder(tmp_path / "in", classes=3, train=60, val=4), tmp_path / "out"
    reference = _files(_finish(source, tmp_path / "whole"))
    driver = multiprocessing.get_context("spawn").Process(target=_drive_on_ray, args=(source, out))
    driver.start()
    driver.join()
    written = {path.name for path in out.glob("attempts/*/*.tar")}
    assert driver.exitcode == -signal.SIGKILL and len(written) > 0
    ref = _finish(source, out)
    assert _files(ref) == reference
    with suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)


def _drive_on_ray(source: Path, out: Path) -> None:
    from cluster.jobs import RayExecutor, Session

    os.setsid()
    Kill("driver", Progress, "update", 4, True).install()
    Session()
    run(
        _config(source),
        {},
        StageContext(out=str(out), executor=RayExecutor(), resources=Resources(workers=2)),
    )


@pytest.mark.slow
def test_ray_replaces_a_killed_worker_and_no_byte_changes(tmp_path: Path) -> None:
    from cluster.jobs import RayExecutor, Session

    source = write_image_folder(tmp_path / "in", classes=3, train=60, val=4)
    reference = _files(_finish(source, tmp_path / "whole"))

    class Deadly(RayExecutor):
        def map(self, fn: Callable[[Any], Any], items: Iterable[Any], resources: Resources) -> Iterator[Any]:
            def killed_once(item: Any) -> Any:
                return _killed_once(fn, tmp_path / "killed", item)

            yield from super().map(killed_once, items, resources)

    session = Session()
    try:
        for executor in (Deadly(), RayExecutor()):
            out = tmp_path / type(executor).__name__
            context = StageContext(out=str(out), executor=executor, resources=Resources(workers=2))
            artifact = run(_config(source), {}, context).artifact
            assert isinstance(artifact, DatasetRef) and (tmp_path / "killed").exists()
            assert _files(artifact) == reference
    finally:
        session.close()


def _killed_once(fn: Callable[[Any], Any], marker: Path, item: Any) -> Any:
    """`fn(item)`; the first process that comes here is killed in the middle of its first shard."""
    with suppress(FileExistsError):
        marker.touch(exist_ok=False)
        Kill("driver", TarWriter, "add_pair", 3, True).install()
    return fn(item)


def test_workers_of_a_killed_program_end_with_it(image_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "in" / "train"
    for number in range(5000):  # hard links: work enough for a minute, however late the kill comes
        name = f"class_{number % 3}/img_{number % 10}.jpg"
        link = images / f"class_{number % 3}" / f"{number}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(image_folder / "train" / name)
    command = [sys.executable, "-m", "stages.shard", "--out", str(tmp_path / "out"), "--workers", "2"]
    settings = ["--set", "name=killed", "--set", f"source={images.parent}", "--set", "shard_samples=1"]
    driver = psutil.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out/parts"
    while driver.poll() is None and not (parts.is_dir() and any(parts.rglob("*.json"))):
        time.sleep(0.005)
    assert driver.poll() is None, "it ended before it was killed"
    workers = driver.children()
    driver.kill()
    driver.wait()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=60)[1] == []
