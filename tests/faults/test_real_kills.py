"""kill -9 where everything is real: JPEGs in shards, an S3 server, ZeRO-3 in bf16; under torchrun and under Ray.

What the killed runs end with equals, bit for bit, an undisturbed run on local files. A single worker under Ray is
killed too: it is restarted by the runner, as groups are by their executor.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from cluster import distributed, storage
from cluster.jobs import RayExecutor, Session
from cluster.resources import Resources
from pipeline.runner import Runner
from pipeline.status import State
from stages.artifacts import Outcome
from stages.context import StageContext
from tests.faults.runs import SAME_ARITHMETIC, STEP_S, Run, ranks_of, until
from tests.pipeline import toys
from tests.stages.images import shard_folder, write_image_folder
from tests.stages.train import ranks, toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, INTERVAL = 24, 4
LOOP: dict[str, Any] = {
    "global_batch": 8,
    "schedule": {"steps": STEPS, "warmup_steps": 2},
    "optimiser": {"lr": 0.01},
    "checkpoint": {"save_every_steps": INTERVAL},
    "ema_decay": 0.9,
    "engine": {"zero_stage": 3, "precision": "bf16", "zero3_persist_numel": 0},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a data set of 42 JPEGs in 6 shards: five steps an epoch."""
    folder = tmp_path_factory.mktemp("data")
    source = write_image_folder(folder / "images", train=14, val=1)
    shard_folder(source, folder / "shards", shard_samples=8)
    return folder / "shards"


def manifest(folder: str) -> str:
    [found] = [info.uri for info in storage.list_files(folder) if info.uri.endswith("manifest.json")]
    return found


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), loop=LOOP, manifest=manifest(str(shards)), step_s=0)
    assert run.ends_well(run.launch()), run.errors()
    return run


def test_shards_on_s3_zero_3_and_bf16_survive_ranks_launchers_and_uploads_cut_off(
    shards: Path, whole: Run, seeded: random.Random, seaweedfs_root: str, tmp_path: Path
) -> None:
    """Seven deaths: of two ranks inside uploads, one around a commit, one in a step, and three of the launcher."""
    storage.upload_tree(shards, f"{seaweedfs_root}/data")
    steps = seeded.sample(range(INTERVAL, STEPS - INTERVAL, INTERVAL), 3)
    kills = [
        {"where": "during upload_file", "step": steps[0], "rank": 0, "call": seeded.randrange(3)},
        {"where": "during upload_file", "step": steps[1], "rank": 1, "call": 0},
        {"where": f"{seeded.choice(['before', 'after'])} write_json_exclusive", "step": steps[2], "rank": 0},
    ]
    run = Run(
        tmp_path, out=f"{seaweedfs_root}/run", manifest=manifest(f"{seaweedfs_root}/data"), loop=LOOP,
        kills=kills, upload_s=0.02,
    )  # fmt: skip
    targets = sorted(seeded.sample(range(2, STEPS - 2 * INTERVAL), 3))
    for victim, target in zip(seeded.sample(["rank", "launcher", "upload"], 3), targets, strict=True):
        run.let(target)
        launcher, before = run.launch(), len(run.starts())
        until(lambda n=before: len(run.starts()) > n, launcher)
        until(lambda step=target: run.step() >= step, launcher)
        if victim == "upload":
            run.begin_upload(target, INTERVAL, launcher)
        until(lambda process=launcher: len(ranks_of(process)) == 2, launcher)
        time.sleep(seeded.uniform(0, STEP_S))
        alive = list(ranks_of(launcher).values())
        if victim == "rank":
            seeded.choice(alive).kill()
            starts = len(run.starts())
            until(lambda n=starts: len(run.starts()) > n, launcher)
            alive = list(ranks_of(launcher).values())
        launcher.kill()
        launcher.wait()
        assert not psutil.wait_procs(alive, timeout=60)[1], "ranks outlived their launcher"
        run.open()
    assert run.ends_well(run.launch()), run.errors()
    assert run.killed() == len(kills)
    run.check(whole, len(targets) + 1, bound=INTERVAL)


def rank(spec: dict) -> dict:
    """A rank of the toy run under Ray."""
    Path(spec["marks"], f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    toy.same_arithmetic()
    world = distributed.init(use_gpu=False, timeout_s=spec["timeout_s"])
    toy.killer.install(spec, world.rank)
    try:
        return {"step": toy.train(spec, world)["step"]}
    finally:
        distributed.shutdown()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    for name, value in (SAME_ARITHMETIC | {"DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    session = Session()
    yield session
    session.close()


def test_group_under_ray_restarts_by_itself_after_kills_and_a_rank_that_stands_still(
    session: Session, shards: Path, whole: Run, seeded: random.Random, tmp_path: Path
) -> None:
    """One rank dies inside an upload, one in a step, and one is stopped (SIGSTOP), which the time limit ends."""
    first, second = sorted(seeded.sample(range(2 * INTERVAL, STEPS - 2), 2))
    kill = {"where": "during upload_file", "step": INTERVAL, "rank": seeded.randrange(2)}
    run = Run(tmp_path, loop=LOOP, manifest=manifest(str(shards)), kills=[kill], step_s=0.2, timeout_s=20)
    sent: list[tuple[int, int]] = []

    def disturb() -> None:
        for target, kind in zip((first, second), (signal.SIGKILL, signal.SIGSTOP), strict=True):
            deadline, starts = time.monotonic() + 400, 2 + len(sent)
            run.let(target)
            while time.monotonic() < deadline and not (len(run.starts()) >= starts and run.step() >= target):
                time.sleep(0.01)
            pid = int((tmp_path / f"pid-{seeded.randrange(2)}").read_text())
            sent.append((pid, kind))
            os.kill(pid, kind)
        run.open()

    run.let(first)
    thread = Thread(target=disturb, daemon=True)
    thread.start()
    executor = RayExecutor(max_restarts=6)  # a busy machine may exceed the time limit once more
    found = executor.workers(rank, run.spec, Resources(workers=2, cpus=0.5))
    thread.join(timeout=10)
    assert found == {"step": STEPS} and run.killed() == 1 and len(sent) == 2
    assert not any(psutil.pid_exists(pid) for pid, _ in sent), (
        "nobody is left behind, not even the stopped one"
    )
    assert len(executor.worker_seconds) >= 4 and all(seconds > 0 for seconds in executor.worker_seconds)
    run.check(whole, 4, bound=INTERVAL)


def single(config: toys.ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
    """A stage of one worker, which dies where its spec says."""
    spec = storage.read_json(f"{config.calls}/spec.json")
    with Path(config.calls, "attempts").open("a") as file:
        file.write(f"{context.attempt}\n")
    result = context.executor.workers(rank, spec, context.resources)
    return toys.train(config.model_copy(update={"calls": "", "value": result["step"]}), inputs, context)


def test_single_worker_under_ray_is_restarted_as_often_as_a_group(
    monkeypatch: pytest.MonkeyPatch, seeded: random.Random, shards: Path, tmp_path: Path
) -> None:
    """Three deaths and no retries: at a commit, inside an upload, and in a step from outside the process."""
    for name, value in (SAME_ARITHMETIC | {"DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    for folder in folders:
        folder.mkdir()
    loop = LOOP | {"engine": {"zero_stage": 2, "precision": "bf16"}}
    places = ["before write_json_exclusive", "during upload_file", "half save_file"]
    steps = sorted(seeded.sample(range(INTERVAL, STEPS, INTERVAL), 3))
    kills = [{"where": w, "step": s, "rank": 0} for w, s in zip(places, steps, strict=True)]
    whole = Run(folders[0], loop=loop, manifest=manifest(str(shards)), step_s=0)
    assert ranks.run(1, whole.spec, tmp_path / "ranks") == [0], ranks.errors(tmp_path / "ranks")
    run = Run(folders[1], loop=loop, manifest=manifest(str(shards)), kills=kills)

    template = toys.chain()[0].inputs["checkpoint"]
    config = toys.ToyConfig(calls=str(folders[1]))
    step = replace(template, fn=single, config=config, retries=0)
    [status] = Runner(str(tmp_path / "root"), "toy", [step]).run()
    assert status.state is State.DONE and run.killed() == 3
    attempts = (folders[1] / "attempts").read_text().split()
    assert len(set(attempts)) == len(attempts) == 4, "no two starts write under the same name"
    run.check(whole, 4, bound=INTERVAL)


@pytest.fixture
def seeded(request: pytest.FixtureRequest) -> random.Random:
    """Instants that differ from test to test, and are the same in every run."""
    return random.Random(request.node.name)
