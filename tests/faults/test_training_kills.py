"""kill -9 at 30 seeded instants: of ranks, inside saves and uploads, of the launcher. All runs end as if undisturbed.

Two real gloo processes under torchrun, which restarts the group when a rank dies; after the death of the launcher the
same command is issued again, and nothing else is done.
"""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import psutil
import pytest

from tests.faults.runs import STEP_S, Run, ranks_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, INTERVAL = 44, 4
INSTANTS = 10  # of each of the three kinds
LOOP: dict[str, Any] = {
    "global_batch": 8,
    "schedule": {"steps": STEPS, "warmup_steps": 2},
    "optimiser": {"lr": 0.01},
    "checkpoint": {"save_every_steps": INTERVAL},
    "ema_decay": 0.9,
}
IN_THE_FOREGROUND = LOOP | {"checkpoint": {"save_every_steps": INTERVAL, "background": False}}
# What a save consists of; each is a place to die. Rank 0 writes two files and uploads three, rank 1 one.
PLACES = [(f"{when} save_file", 2, 1) for when in ("half", "before", "after")]
PLACES += [(f"{when} upload_file", 3, 1) for when in ("before", "after")]
PLACES += [(f"{when} write_json_exclusive", 1, 0) for when in ("before", "after")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), loop=LOOP, step_s=0)
    assert run.ends_well(run.launch()), run.errors()
    return run


def test_ten_killed_ranks_are_restarted_and_lose_at_most_an_interval(whole, tmp_path):
    """At random times of the run, from outside; saves in the foreground, so that the bound is exact."""
    draw = random.Random(6)
    run = Run(tmp_path, loop=IN_THE_FOREGROUND)
    targets = sorted(draw.sample(range(1, STEPS - 2), INSTANTS))
    run.let(targets[0])
    launcher = run.launch()
    for number, target in enumerate(targets):
        run.let(target)
        until(lambda n=number: len(run.starts()) == n + 1, launcher)
        until(lambda step=target: run.step() >= step, launcher)
        time.sleep(draw.uniform(0, STEP_S))
        ranks_of(launcher)[draw.randrange(2)].kill()
    run.open()
    assert run.ends_well(launcher), run.errors()
    run.check(whole, INSTANTS + 1, bound=INTERVAL)


def test_ten_ranks_killed_inside_saves_and_uploads(whole, tmp_path):
    """Each place of a save at least once; saves in the background, so that one may be under way when another is due."""
    draw = random.Random(7)
    places = draw.sample(PLACES, len(PLACES)) + draw.sample(PLACES, INSTANTS - len(PLACES))
    steps = draw.sample(range(INTERVAL, STEPS, INTERVAL), INSTANTS)
    kills = []
    for (where, of_rank_0, of_rank_1), step in zip(places, steps, strict=True):
        rank = draw.randrange(2) if of_rank_1 else 0
        call = draw.randrange(of_rank_1 if rank else of_rank_0)
        kills.append({"where": where, "step": step, "rank": rank, "call": call})
    run = Run(tmp_path, loop=LOOP, kills=kills)
    assert run.ends_well(run.launch()), run.errors()
    assert run.killed() == INSTANTS
    run.check(whole, INSTANTS + 1, bound=INTERVAL)


def test_ten_killed_launchers_take_their_ranks_with_them_and_the_same_command_goes_on(whole, tmp_path):
    """3 while the ranks start, 3 inside a slow upload, 4 in steps."""
    draw = random.Random(8)
    run = Run(tmp_path, loop=LOOP, upload_s=0.1)
    kinds = draw.sample(["start"] * 3 + ["upload"] * 3 + ["step"] * 4, INSTANTS)
    for kind, target in zip(kinds, sorted(draw.sample(range(1, STEPS - INTERVAL), INSTANTS)), strict=True):
        run.let(target)
        launcher, before = run.launch(), len(run.starts())
        until(lambda process=launcher: len(ranks_of(process)) == 2, launcher)
        if kind == "start":
            time.sleep(draw.uniform(0, 2))
        else:
            until(lambda n=before: len(run.starts()) > n, launcher)
            until(lambda step=target: run.step() >= step, launcher)
            if kind == "upload":
                run.begin_upload(target, INTERVAL, launcher)
            else:
                time.sleep(draw.uniform(0, STEP_S))
        ranks = ranks_of(launcher).values()
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive, "ranks outlived their launcher"
        run.open()
    assert run.ends_well(run.launch()), run.errors()
    run.check(whole, 7 + 1, bound=INTERVAL)


def test_rank_that_stands_still_is_replaced_after_the_time_limit(whole, tmp_path):
    """Its peer gives up after `timeout_s`, and torchrun, which the stopped rank cannot answer, kills it 30 s later."""
    run = Run(tmp_path, loop=LOOP, timeout_s=10)
    run.let(STEPS // 2)
    launcher = run.launch()
    until(lambda: run.step() >= STEPS // 2, launcher)
    stopped = ranks_of(launcher)[1]
    stopped.suspend()
    run.open()
    assert run.ends_well(launcher), run.errors()
    assert not stopped.is_running()
    run.check(whole, 2, bound=INTERVAL)
