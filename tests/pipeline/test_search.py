"""Early stopping: hopeless trials end as an outcome, a resumed search repeats nothing and judges against what was."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import ConfigError
from cluster.tune import Asha, rungs
from pipeline import recipes
from pipeline.registry import Registry
from pipeline.runner import Runner
from pipeline.search import Judge, Search
from pipeline.status import State, StepStatus, exit_code
from pipeline.step import Step, topological
from stages.context import Progress
from tests.pipeline import toys

ASHA = Search(kind="asha", first_rung=0.25, reduction=2)
TOTAL = 8


def trial(config, inputs, context):
    """A training that tells its progress; its loss is its value. At each rung it waits to be judged."""
    progress = Progress(context.out, total=TOTAL, unit="steps", interval_s=0)
    for step in range(1, TOTAL + 1):
        progress.update(step, force=True, loss=config.value)
        if config.workers and step in (2, 4):
            wait_for_judge(context.out, rungs=step // 2, to_be_killed=config.workers > 1)
    return toys.train(config, inputs, context)


def wait_for_judge(out: str, rungs: int, to_be_killed: bool) -> None:
    """Until so many rungs are written down; one that was stopped and has a process of its own, until that ends."""
    uri, deadline = storage.join(out, "rungs.json"), time.monotonic() + 120
    while time.monotonic() < deadline:
        found = storage.read_json(uri) if storage.exists(uri) else {"rungs": [], "stopped": None}
        if not to_be_killed if found["stopped"] else len(found["rungs"]) >= rungs:
            return
        time.sleep(0.02)


def trials(*losses: float, pace: int = 1) -> list[Step]:
    """`pace`: 0 for trials that nobody judges, 2 for those that have a process of their own."""
    template, steps = toys.chain()[0], []
    trained = toys.replace_function(template.inputs["checkpoint"], trial)
    for number, loss in enumerate(losses):
        own = replace(trained, name=f"t{number}", config=toys.ToyConfig(value=loss, workers=pace))
        steps.append(replace(template, name=f"t{number}", inputs={"checkpoint": own}))
    return steps


def run(root: Path, *losses: float, search: Search | None = ASHA) -> dict[str, StepStatus]:
    steps = trials(*losses, pace=int(search is ASHA))
    runner = Runner(str(root), "toy", steps, open_session=toys.ThreadSession, max_parallel=1, search=search)
    return {status.step.id: status for status in runner.run()}


def states(found: dict[str, StepStatus]) -> list[State]:
    return [status.state for step, status in found.items() if step.startswith("finetune")]


@pytest.fixture(autouse=True)
def fresh_calls() -> None:
    toys.CALLS.clear()
    toys.ThreadSession.opened = 0


def test_worse_trials_are_stopped_and_recorded_and_nothing_is_repeated(tmp_path: Path) -> None:
    found = run(tmp_path, 1.0, 2.0)
    assert states(found) == [State.DONE, State.STOPPED_EARLY]
    assert found["evaluate/t0/v1"].state is State.DONE and found["evaluate/t1/v1"].state is State.BLOCKED
    assert exit_code(list(found.values())) == 0, "an outcome, not a failure"
    ends = {row.step: row for row in Registry(str(tmp_path)).runs()}
    assert ends["finetune/t1/v1"].outcome == "stopped" and "loss 2" in (ends["finetune/t1/v1"].error or "")
    assert ends.keys() == {"finetune/t0/v1", "evaluate/t0/v1", "finetune/t1/v1"}
    assert not storage.exists(f"{tmp_path}/finetune/t1/v1/failure.json")

    calls, opened = list(toys.CALLS), toys.ThreadSession.opened
    again = run(tmp_path, 1.0, 2.0)
    assert (toys.CALLS, toys.ThreadSession.opened) == (calls, opened), "nothing is left to do"
    assert states(again) == [State.DONE, State.STOPPED_EARLY] and exit_code(list(again.values())) == 0

    # A further trial, in a new process's search, is judged against those that were before.
    more = run(tmp_path, 1.0, 2.0, 1.9)
    assert states(more) == [State.DONE, State.STOPPED_EARLY, State.STOPPED_EARLY]
    assert storage.read_json(f"{tmp_path}/finetune/t2/v1/rungs.json")["rungs"][0]["loss"] == 1.9


class Smoothed(toys.ToyConfig):
    """A toy whose loss has another meaning at another `smoothing`."""

    smoothing: float = 0.0

    def objective(self) -> dict:
        return {"label_smoothing": self.smoothing}


def smoothed(*values: tuple[float, float]) -> list[Step]:
    """Trials of (loss, smoothing)."""
    return [
        replace(step, config=Smoothed(value=loss, smoothing=smoothing), name=f"t{number}")
        for number, (loss, smoothing) in enumerate(values)
        for step in [trials(loss)[0].inputs["checkpoint"]]
    ]


def test_only_losses_of_one_objective_are_compared(tmp_path: Path) -> None:
    """Label smoothing makes every loss larger: a trial with it must not be stopped for that."""
    steps = smoothed((1.0, 0.0), (2.0, 0.1), (2.5, 0.0), (2.2, 0.1))

    def run() -> list[State]:
        runner = Runner(
            str(tmp_path), "toy", steps, open_session=toys.ThreadSession, max_parallel=1, search=ASHA
        )
        return [status.state for status in runner.run()]

    expected = [State.DONE, State.DONE, State.STOPPED_EARLY, State.STOPPED_EARLY]
    assert run() == expected and run() == expected


def test_search_without_two_comparable_jobs_is_refused(tmp_path: Path) -> None:
    steps = smoothed((1.0, 0.0), (2.0, 0.1))
    with pytest.raises(ConfigError, match="nothing to compare") as told:
        Runner(str(tmp_path), "toy", steps, open_session=toys.ThreadSession, search=ASHA).run()
    assert (
        told.value.found == "2 jobs that differ in label_smoothing" and "search.kind=off" in told.value.remedy
    )
    assert toys.CALLS == []
    alone = Runner(str(tmp_path), "toy", steps[:1], open_session=toys.ThreadSession, search=ASHA).run()
    assert [status.state for status in alone] == [State.DONE]


def test_fine_tunings_are_compared_within_one_loss_only() -> None:
    def objectives(**grid: list) -> int:
        module = recipes.load("pretrain_base")
        values = {f"grid.{axis.replace('__', '.')}": json.dumps(found) for axis, found in grid.items()}
        steps = topological(module.build(module.Recipe().with_set({"grid.resolution": "[224]"} | values)))
        configs = [step.config for step in steps if step.kind == "finetune"]
        assert len(configs) == 2
        return len({json.dumps(config.objective(), sort_keys=True) for config in configs})

    for axis, values in {
        "lr": [1e-4, 2e-4], "seed": [0, 1], "weight_decay": [0.05, 0.1], "layer_decay": [0.8, 0.9],
        "epochs": [20, 30], "ema_decay": [0.0, 0.9],
    }.items():  # fmt: skip
        assert objectives(**{axis: values}) == 1, axis
    assert objectives(resolution=[224, 384]) == objectives(drop_path=[0.1, 0.2]) == 2
    for key, values in {
        "label_smoothing": [0, 0.1], "mix.mixup": [0, 0.8], "mix.cutmix": [0, 1], "rand_augment": [0, 9],
        "random_erasing": [0, 0.25], "data.view.min_scale": [0.08, 0.3],
    }.items():  # fmt: skip
        assert objectives(more={key: values}) == 2, key


def test_a_rung_is_the_mean_over_distinct_steps_however_often_one_is_seen(tmp_path: Path) -> None:
    [evaluated] = trials(1.0)
    trained = evaluated.inputs["checkpoint"]
    judge = Judge(str(tmp_path), ASHA, [trained])
    progress = Progress(trained.output(str(tmp_path)), total=TOTAL, unit="steps", interval_s=0)
    for step, loss, looks in ((1, 4.0, 5), (2, 2.0, 3), (3, 7.0, 4), (2, 2.0, 2), (4, 1.0, 2)):
        progress.update(step, force=True, loss=loss)
        for _ in range(looks):
            judge.look(trained, began=0)
    told = storage.read_json(f"{trained.output(str(tmp_path))}/rungs.json")["rungs"]
    assert [(rung["rung"], rung["loss"]) for rung in told] == [(0.25, 3.0), (0.5, 4.0)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hopeless_trial_on_a_real_ray_is_ended_before_its_end(tmp_path: Path) -> None:
    steps = trials(1.0, 2.0, pace=2)
    runner = Runner(str(tmp_path), "toy", steps, max_parallel=1, search=ASHA)
    found = {status.step.id: status for status in runner.run()}
    assert states(found) == [State.DONE, State.STOPPED_EARLY]
    progress = storage.read_json(f"{tmp_path}/finetune/t1/v1/progress.json")
    assert progress["done"] < TOTAL
    assert not storage.list_files(f"{tmp_path}/finetune/t1/v1/attempts"), (
        "its process wrote nothing after that"
    )


def test_without_a_search_every_trial_finishes(tmp_path: Path) -> None:
    assert states(run(tmp_path, 1.0, 2.0, search=Search())) == [State.DONE, State.DONE]
    assert not storage.exists(f"{tmp_path}/finetune/t1/v1/rungs.json")


def test_asha_halves_at_each_rung() -> None:
    judge = Asha(0.25, 2)
    assert judge.rungs == [0.25, 0.5]
    first = [judge.hopeless(f"t{n}", 0.25, value) for n, value in enumerate([1.0, 4.0, 2.0, 0.5])]
    assert first == [False, True, False, False]
    assert [
        judge.hopeless("t0", 0.5, 0.9),
        judge.hopeless("t3", 0.5, 0.4),
        judge.hopeless("t2", 0.5, 1.8),
    ] == [
        False,
        False,
        True,
    ]
    assert not judge.hopeless("t0", 0.25, 99.0), "what was told once stands"


def test_rungs_grow_by_the_reduction() -> None:
    assert rungs(0.1, 3) == pytest.approx([0.1, 0.3, 0.9])
