"""Deletion against promotions, roll-backs and running steps: random histories of the real code, cut at every call.

Whatever the order, and whoever dies in the middle: nothing that an alias points at, that a step was given, or that
something kept was made from is ever deleted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import storage
from cluster.errors import ConfigError
from pipeline import runner as runners
from pipeline.registry import Registry, aliases, deletions, garbage, inventory, store
from pipeline.registry.aliases import Aliases
from pipeline.registry.deletions import Deleted, Deletions, key
from pipeline.registry.lineage import find
from pipeline.registry.retention import KeepRule, Retention
from pipeline.runner import Runner
from pipeline.status import State
from pipeline.step import Step
from tests.pipeline import toys
from tests.pipeline.interleave import InlinePool, Killed, Play, raw

ROOT = "/memory"
NOTHING_STAYS = Retention(rules=(KeepRule(task="pretrain", last=0), KeepRule(task="classify", last=0)))


class Inline:
    """A session whose tasks run at once, in the thread that submits them."""

    def submit(self, fn: Callable[..., Any], *args: Any, **_: Any) -> Any:
        value = fn(*args)
        return SimpleNamespace(result=lambda: value, cancel=lambda: None)

    def wait(self, jobs: list[Any], timeout_s: float) -> list[Any]:
        return jobs


def trained(name: str, parent: Step | None = None, version: str = "v1") -> Step:
    """A step that makes weights, and reads those it was made from."""
    return Step(
        kind="finetune" if parent else "pretrain", name=name, version=version, fn=toys.train_from,
        config=toys.ToyConfig(value=float(sum(map(ord, name + version)))), inputs={"init": parent} if parent else {},
    )  # fmt: skip


def evaluated(checkpoint: Step, name: str) -> Step:
    return Step(
        kind="evaluate", name=name, fn=toys.evaluate, config=toys.ToyConfig(), inputs={"checkpoint": checkpoint}
    )  # fmt: skip


P1, P2 = trained("p", version="v1"), trained("p", version="v2")
F1, F2 = trained("f1", P1), trained("f2", P2)
DONE = [evaluated(F1, "f1"), F2]  # with all that they need
THERE = {step.id: step for step in (P1, P2, F1, F2)}


def run_step(step: Step) -> None:
    """What the runner does with one step, on the caller's thread."""
    runner = Runner(ROOT, "toy", [step], wait_for_lease=False)
    runner.plan()
    runner._session = Inline()  # type: ignore[assignment]
    for status in runner.status.values():
        if status.state is State.TODO:
            runner._set(status.step, State.DONE, record=runner._run_step(status.step))


def promote(step: str, name: str) -> str:
    return Aliases(Registry(ROOT)).promote(find(Registry(ROOT), step), name).current.id


def rollback(name: str) -> str:
    return Aliases(Registry(ROOT)).rollback(name).current.id


def collect() -> None:
    after_the_grace = time.time() + 2 * 86400.0
    garbage.collect(Registry(ROOT), lambda recipe: NOTHING_STAYS, after_the_grace)


ACTIONS = st.one_of(
    st.just(("gc",)),
    st.tuples(st.just("promote"), st.sampled_from(sorted(THERE)), st.sampled_from(["production", "best"])),
    st.tuples(st.just("rollback"), st.just("production")),
    st.tuples(st.just("train"), st.sampled_from(sorted(THERE))),
    st.tuples(st.just("evaluate"), st.sampled_from(sorted(THERE))),
)


def work_of(number: int, action: tuple[str, ...]) -> Callable[[], Any]:
    match action:
        case ("gc",):
            return collect
        case ("promote", step, name):
            return partial(promote, step, name)
        case ("rollback", name):
            return partial(rollback, name)
        case ("train", step):
            return partial(run_step, trained(f"new{number}", THERE[step]))
        case _:
            return partial(run_step, evaluated(THERE[action[1]], f"new{number}"))


def objects(play: Play, folder: str) -> list[dict[str, Any]]:
    prefix = f"{ROOT}/{folder}/"
    return [json.loads(d) for p, (d, _) in list(play.store.objects.items()) if p.startswith(prefix)]


def check(play: Play) -> None:
    """What must hold at every instant."""
    there = play.store.objects
    for alias in objects(play, "registry/aliases"):
        raw(play, alias["moves"][-1]["checkpoint"])
    decided = {d["checkpoint"] for d in objects(play, "registry/deleted") if d["state"] == "deleted"}
    records = [json.loads(d) for p, (d, _) in list(there.items()) if p.endswith("/record.json")]
    by_step = {record["step"]: record for record in records}
    for record in records:
        artifact = record["artifact"]
        if artifact["kind"] == "checkpoint" and artifact["uri"] not in decided:
            raw(play, artifact["uri"])
            for needed in record["inputs"].values():
                raw(play, by_step[needed["step"]]["artifact"]["uri"])


@pytest.fixture(scope="module")
def play() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (store, deletions, garbage, inventory):
            patch.setattr(module, "ThreadPoolExecutor", InlinePool)
        patch.setattr(aliases, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: None))
        patch.setattr(runners, "code_version", lambda: "test")
        patch.setattr(runners, "library_versions", dict)
        yield Play(patch)


@pytest.fixture(scope="module")
def finished(play: Play) -> dict[str, tuple[bytes, float]]:
    """The store when P1 → F1 → evaluation and P2 → F2 are done."""
    for step in DONE:
        run_step(step)
    return dict(play.store.objects)


def histories(examples: int) -> Callable[..., Any]:
    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        given_ = given(
            before=st.lists(st.sampled_from(sorted(THERE)), max_size=3),
            actions=st.lists(ACTIONS, min_size=1, max_size=4),
            deaths=st.lists(st.none() | st.integers(0, 120), min_size=5, max_size=5),
            schedule=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60)), max_size=30),
        )
        relaxed = settings(
            max_examples=examples, deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )  # fmt: skip
        return given_(relaxed(test))

    return decorate


def history(
    play: Play,
    finished: dict[str, tuple[bytes, float]],
    before: list[str],
    actions: list[tuple[str, ...]],
    deaths: list[int | None],
    schedule: list[tuple[int, int]],
) -> None:
    play.store.objects = dict(finished)
    for step in before:
        promote(step, "production")
    actors = {
        f"{number} {' '.join(action)}": (work_of(number, action), deaths[number])
        for number, action in enumerate([("gc",), *actions])
    }
    cast = play.run(actors, schedule, lambda: check(play))
    moves = {move["id"] for alias in objects(play, "registry/aliases") for move in alias["moves"]}
    for actor in cast.values():
        kind = actor.name.split()[1]
        if kind in ("promote", "rollback"):
            assert actor.result is None or actor.result in moves, "an acknowledged move is lost"
        allowed = (
            (Deleted, ConfigError) if kind == "rollback" else Deleted
        )  # there may be nothing to go back to
        assert actor.error is None or actor.killed or isinstance(actor.error, allowed), repr(actor.error)
    collect()  # what the dead left behind keeps nobody from going on
    check(play)
    gone = [d for d in objects(play, "registry/deleted") if d["state"] == "deleted"]
    assert all(d["checkpoint"] not in play.store.objects for d in gone)
    told = [event["checkpoint"] for event in objects(play, "registry/deletions")]
    assert sorted(told) == sorted(d["checkpoint"] for d in gone)


@histories(80)
def test_nothing_referenced_is_ever_deleted(play, finished, before, actions, deaths, schedule) -> None:
    history(play, finished, before, actions, deaths, schedule)


@pytest.mark.slow
@pytest.mark.timeout(600)
@histories(1000)
def test_nothing_referenced_is_ever_deleted_in_many_histories(
    play, finished, before, actions, deaths, schedule
) -> None:
    history(play, finished, before, actions, deaths, schedule)


OTHERS = [("promote", F1.id, "best"), ("train", P1.id)]
GC_CALLS, OTHER_CALLS = 56, 18  # of the store, at least as many as each of them makes alone
LOOKED = 11  # calls after which gc has looked for references once and has marked nothing yet


def cuts(play, finished, action: tuple[str, ...], begun: range | tuple[int, ...], looked: int) -> int:
    """gc looks, the other one begins, gc works, the other one ends, gc ends; how many of all cuts went wrong."""
    broken = 0
    for first in begun:
        for second in range(1, GC_CALLS - looked):
            schedule = [(0, looked), (1, first), (0, second), (1, 10**6), (0, 10**6)]
            try:
                history(play, finished, [], [action], [None] * 5, schedule)
            except AssertionError:
                broken += 1
    return broken


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("looked", [0, LOOKED])
@pytest.mark.parametrize("action", OTHERS, ids=" ".join)
def test_no_place_to_cut_two_actors_loses_anything(play, finished, action, looked: int) -> None:
    assert cuts(play, finished, action, range(1, OTHER_CALLS), looked) == 0


def no_claim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Deletions, "claim", lambda self, checkpoint, why: None)


def no_second_look(patch: pytest.MonkeyPatch) -> None:
    real, seen = garbage.survey, []

    def once(*arguments: Any) -> garbage.Survey:
        seen.append(real(*arguments) if len(seen) % 2 == 0 else seen[-1])
        return seen[-1]

    patch.setattr(garbage, "survey", once)


def aliases_before_pins(patch: pytest.MonkeyPatch) -> None:
    real_all, real_pins, early = Aliases.all, Deletions.pins, []

    def pins(self: Deletions) -> Any:
        early.append(real_all(Aliases(self._registry)))
        return real_pins(self)

    patch.setattr(Deletions, "pins", pins)
    patch.setattr(Aliases, "all", lambda self: early.pop() if early else real_all(self))


@pytest.mark.parametrize(
    ("hole", "action", "begun"),
    [
        (no_claim, OTHERS[0], (1,)),
        (no_claim, OTHERS[1], (1,)),
        (no_second_look, OTHERS[1], (1,)),
        (aliases_before_pins, OTHERS[0], (11, 12, 13)),  # it has claimed, and moves the alias next
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_part_of_the_protocol_is_needed(
    play, finished, monkeypatch: pytest.MonkeyPatch, hole, action, begun
) -> None:
    assert cuts(play, finished, action, begun, LOOKED) == 0
    hole(monkeypatch)
    assert cuts(play, finished, action, begun, LOOKED) > 0, "the histories are too few to find this hole"


def test_a_process_that_dies_after_its_pin_holds_the_checkpoint_and_only_for_a_while(play, finished) -> None:
    play.store.objects = dict(finished)
    uri = find(Registry(ROOT), F1.id).checkpoint.uri
    with pytest.raises(Killed), Deletions(Registry(ROOT)).pinned(uri, "test"):
        pin = next(p for p in play.store.objects if f"/pins/{key(uri)}/" in p)
        kept = play.store.objects[pin]
        raise Killed
    play.store.objects[pin] = kept
    collect()
    raw(play, uri)
    play.store.objects[pin] = (kept[0], kept[1] - deletions.PIN_S - 1)
    collect()
    assert uri not in play.store.objects and pin not in play.store.objects
    with pytest.raises(Deleted):
        promote(F1.id, "production")
    assert not storage.exists(f"{ROOT}/registry/aliases/production.json")
