"""The loop on two real processes. One launch runs many scenarios, since starting DeepSpeed takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import storage
from stages.train import loop
from tests.stages.train import ranks

pytestmark = pytest.mark.timeout(600)  # several processes; a busy machine starts them slowly

CURVE = Path(__file__).with_name("data") / "curve.json"
BASE: dict[str, Any] = {
    "global_batch": 8,
    "schedule": {"steps": 8},
    "optimiser": {"lr": 0.01},
    "checkpoint": {"save_every_steps": 4},
}
KEPT = {"save_every_steps": 2, "keep_last": 1, "keep_every_steps": 6, "keep_best": 1, "best_by": "loss_head"}

BAD = [
    [1, 0, 3, "cat/1", "cut"],
    [2, 1, 5, "cat/2", "cut"],
    [3, 1, 5, "cat/2", "cut"],
    [6, 0, 9, "dog/1", "grey"],
]


def scenarios(root: Path) -> dict[str, dict[str, Any]]:
    def loop(**changes: Any) -> dict[str, Any]:
        return BASE | changes

    guard = {"max_bad_steps": 2, "max_rollbacks": 1}
    saves = {"save_every_steps": 8}  # and half-way between, since it is in the background: 4, 8, 12
    fp16 = {"precision": "fp16"}
    specs: dict[str, dict[str, Any]] = {
        "golden": {"loop": loop(schedule={"steps": 30, "warmup_steps": 5}, checkpoint={}, ema_decay=0.9)},
        "ddp": {"mode": "ddp", "dropout": 0, "loop": loop()},
        **{
            f"zero{z}": {"dropout": 0, "loop": loop(engine={"zero_stage": z, "zero3_persist_numel": 0})}
            for z in range(4)
        },
        **{
            f"bf16 zero{z}": {"dropout": 0, "loop": loop(engine={"zero_stage": z, "precision": "bf16"})}
            for z in range(4)
        },
        "fp16": {"dropout": 0, "fake_fp16": True, "nan_at": [6], "loop": loop(engine={"precision": "fp16"})},
        **{
            f"pieces {precision} zero{z}": {
                "dropout": 0,
                "fake_fp16": precision == "fp16",
                "loop": loop(engine={"zero_stage": z, "precision": precision, "micro_batch": 1}),
            }
            for precision in ("bf16", "fp16")
            for z in (1, 2, 3)
        },
        "pieces": {"dropout": 0, "loop": loop(engine={"micro_batch": 2})},
        "nan": {"nan_at": [3], "loop": loop(checkpoint={"save_every_steps": 4, "keep_last": 9})},
        "gradient": {"bad_gradient_at": [3], "loop": loop(engine={"zero_stage": 0})},
        **{
            f"gradient {precision} zero{z}": {
                "bad_gradient_at": [3],
                "loop": loop(engine={"zero_stage": z, "precision": precision}),
            }
            for precision in ("fp32", "bf16")
            for z in range(4)
        },
        # Two bad samples on each rank, one of them twice: no rank is over the limit, all together are.
        "bad": {"bad_limit": 2, "bad_at": BAD, "loop": loop()},
        "bad at first": {"bad_limit": 2, "bad_at": BAD[:3], "terminate_at": 5, "loop": loop()},
        "diverges": {
            "nan_at": [5, 6, 7, 8],
            "loop": loop(schedule={"steps": 12}, guard=guard, checkpoint=saves),
        },
        "recovers": {"nan_at": [5, 6], "loop": loop(guard=guard, checkpoint=saves)},
        "overflows": {
            "fake_fp16": True,
            "bad_gradient_at": list(range(5, 20)),
            "loop": loop(
                engine=fp16, schedule={"steps": 20}, guard=guard | {"max_overflows": 2}, checkpoint=saves
            ),
        },
        "lowest scale": {
            "fake_fp16": True,
            "lowest_scale_at": 5,
            "bad_gradient_at": [5, 6],
            "loop": loop(engine=fp16),
        },
        "spike": {"spike_at": [6], "loop": loop(guard={"spike_factor": 3, "spike_window": 5})},
        "terminated": {"terminate_at": 5, "loop": loop(watch={"tensorboard": True})},
        "disk full": {"disk_full_at": 5, "loop": loop(checkpoint=saves)},
        "other data": {"data": ["one", "another"], "loop": loop()},
        "other code": {"code": ["one", "another"], "loop": loop()},
        "other config": {"other_loop": {"seed": 1}, "loop": loop()},
        "other settings": {"other_loop": {"engine": {"zero_stage": 2}}, "loop": loop()},
        "odd batch": {"loop": loop(global_batch=7)},
        "minutes": {"late_at": [2, 5], "loop": loop(checkpoint={"save_every_minutes": 1000, "keep_last": 9})},
        # From step 8 on the losses are a hundred times as large, so the best save is among those before.
        "kept": {"spike_at": [8, 9, 10, 11], "loop": loop(schedule={"steps": 12}, checkpoint=KEPT)},
        "no such loss": {"loop": loop(checkpoint={"keep_best": 1, "best_by": "loss_haed"})},
    }
    for name, spec in specs.items():
        spec |= {
            "name": name.replace(" ", ""),
            "out": str(root / name),
            "result": str(root / f"{name}.result"),
        }
    # The same output folder again: it goes on where it was told to stop.
    specs["resumed"] = {**specs["terminated"], "result": str(root / "resumed.result"), "name": "resumed"}
    del specs["resumed"]["terminate_at"]
    later = {"bad_at": BAD, "result": str(root / "bad later.result"), "name": "badlater"}
    specs["bad later"] = {**specs["bad at first"], **later}
    del specs["bad later"]["terminate_at"]
    specs["room again"] = {**specs["disk full"], "result": str(root / "room again.result"), "name": "again"}
    del specs["room again"]["disk_full_at"]
    specs["undisturbed"] = {
        **specs["resumed"],
        "out": str(root / "undisturbed"),
        "result": str(root / "undisturbed.result"),
    }
    changed = {**specs["nan"], "result": str(root / "changed.result")}
    specs["changed"] = changed | {"loop": loop(optimiser={"lr": 0.02}), "name": "changed"}
    return specs


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    root = tmp_path_factory.mktemp("loop")
    specs = scenarios(root)
    codes = ranks.run(2, list(specs.values()), root / "processes", timeout_s=400)
    text = ranks.errors(root / "processes")
    assert codes[0] == codes[1] and "Traceback" not in text, text
    return root, {name: ranks.results(root / f"{name}.result", 2) for name in specs}


def test_golden_curve_of_30_steps_is_reproduced_exactly(ran):
    found = [loss.hex() for loss in ran[1]["golden"][0]["losses"]]
    assert len(found) == 30
    assert found == json.loads(CURVE.read_text())


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "pieces"])
def test_every_zero_stage_takes_the_steps_of_plain_ddp(ran, name):
    assert ran[1][name][0]["losses"] == pytest.approx(ran[1]["ddp"][0]["losses"], rel=2e-6)


@pytest.mark.parametrize("stage", range(4))
def test_zero_stage_is_really_in_effect(ran, stage):
    for facts in (result["partition"] for result in ran[1][f"zero{stage}"]):
        whole = facts["parameters"]
        assert facts["stage"] == stage
        assert facts["resident"] == (whole if stage < 3 else 0)
        padded = 0.02 * whole + 64
        assert facts["optimiser"] == pytest.approx(whole if stage == 0 else whole / 2, abs=padded)


@pytest.mark.parametrize("stage", range(4))
def test_bf16_follows_the_fp32_curve_within_its_precision(ran, stage):
    assert ran[1][f"bf16 zero{stage}"][0]["losses"] == pytest.approx(ran[1]["ddp"][0]["losses"], rel=5e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pieces_in_16_bits_follow_the_fp32_curve_within_their_precision(ran, stage, precision):
    found = ran[1][f"pieces {precision} zero{stage}"][0]["losses"]
    assert found == pytest.approx(ran[1]["ddp"][0]["losses"], rel=5e-3)


def test_fp16_overflow_lowers_the_loss_scale_and_is_no_fault(ran):
    result = ran[1]["fp16"][0]
    assert result["losses"][:6] == pytest.approx(ran[1]["ddp"][0]["losses"][:6], rel=5e-3)
    assert result["optimiser_steps"] == 7


def test_full_disk_ends_the_run_and_leaves_the_last_checkpoint_usable(ran):
    root, results = ran
    for result in results["disk full"]:
        assert (
            result["error"] == "StepFailed"
            and "could not write the checkpoint of step 8" in result["message"]
        )
    assert _hashes(root / "disk full", 8) == _hashes(root / "undisturbed", 8)


GRADIENTS = [f"gradient {precision} zero{z}" for precision in ("fp32", "bf16") for z in range(4)]


@pytest.mark.parametrize("name", ["nan", "gradient", *GRADIENTS])
def test_bad_value_on_one_rank_is_applied_on_none(ran, name):
    result = ran[1][name][0]
    assert result["step"] == 8 and result["optimiser_steps"] == 7
    assert [event["event"] for event in result["events"]] == ["step not applied"]
    steps = _lines(ran[0] / name, result)
    assert [line["applied"] for line in steps] == [True] * 3 + [False] + [True] * 4


def test_save_that_is_due_at_a_bad_step_waits_for_a_good_one(ran):
    saved = sorted((ran[0] / "nan" / "checkpoints").glob("*.json"))
    assert [int(path.stem) for path in saved] == [2, 5, 6, 8]  # step 4 was bad


def test_bad_steps_in_a_row_roll_back_and_the_run_goes_on_past_them(ran):
    result = ran[1]["recovers"][0]
    assert result["rollbacks"] == 1 and result["step"] == 8
    # Steps 1-4 count in the checkpoint rolled back to; the fifth is lost with it; 6 and 7 were bad; 8 is good.
    assert result["optimiser_steps"] == 5
    assert result["notes"] == ["rolled back to the weights of step 4; data up to step 7 skipped"]


def test_roll_back_takes_the_guards_and_the_running_means_back_to_the_checkpoint(ran):
    root, results = ran
    saved = storage.read_json(str(root / "recovers" / "checkpoints" / "000000004.json"))
    for rank in range(2):
        guard, smoothed = results["recovers"][rank]["statistics"]["7"]  # the first step after it
        assert guard == saved["guard"] | {"rollbacks": 1} and len(guard["recent"]) == 4
        assert smoothed == saved["smoothed"]
        assert results["recovers"][rank]["statistics"]["5"] != [saved["guard"], saved["smoothed"]]


def test_overflows_of_fp16_that_do_not_end_roll_back_and_then_stop_with_code_6(ran):
    root, results = ran
    for result in results["overflows"]:
        assert (
            result["error"] == "TrainingDiverged"
            and "in a row, at ever lower loss scales" in result["message"]
        )
        assert "training diverged at step 13" in result["message"]
    progress = storage.read_json(str(root / "overflows" / "progress.json"))
    lowered = "fp16 overflow: loss scale lowered"
    expected = [lowered, lowered, "step not applied", "step not applied", "rolled back"] * 2
    assert [event["event"] for event in progress["events"]] == expected[:-1]


def test_overflow_at_the_lowest_loss_scale_of_fp16_is_a_step_not_applied(ran):
    result = ran[1]["lowest scale"][0]
    assert result["step"] == 8 and result["optimiser_steps"] == 6
    assert [event["event"] for event in result["events"]] == ["step not applied"] * 2
    assert "lowest loss scale" in result["events"][0]["reason"]


def test_divergence_ends_with_its_error_on_all_ranks_and_leaves_its_events(ran):
    for result in ran[1]["diverges"]:
        assert result["error"] == "TrainingDiverged" and "after 1 roll-backs" in result["message"]
    paths = sorted((ran[0] / "diverges" / "metrics").glob("*.jsonl"))
    assert paths[-1].name.endswith("-diverged.jsonl")
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    events = [line["event"] for line in lines if "event" in line]
    assert events == ["step not applied"] * 2 + ["rolled back"] + ["step not applied"] * 2


@pytest.mark.parametrize("name", ["bad", "bad later"])
def test_bad_samples_of_all_ranks_and_tries_count_together(ran, name):
    assert {r["error"] for r in ran[1]["bad at first"]} == {"Stopped"}
    for result in ran[1][name]:
        assert result["error"] == "DataInvalid" and "3 samples do not decode" in result["message"]
        assert all(
            text in result["message"] for text in ("cat/1 (sample 3)", "cat/2", "dog/1 (sample 9): grey")
        )


def test_spike_is_not_applied(ran):
    result = ran[1]["spike"][0]
    assert result["optimiser_steps"] == 7 and "recent median" in result["events"][0]["reason"]


def test_sigterm_saves_and_the_next_try_ends_as_if_nothing_had_happened(ran):
    root, results = ran
    assert {r["error"] for r in results["terminated"]} == {"Stopped"}
    assert "after step 6 of 8" in results["terminated"][0]["message"]
    assert results["resumed"][0]["losses"] == results["undisturbed"][0]["losses"]
    assert _hashes(root / "terminated", 8) == _hashes(root / "undisturbed", 8)


def test_event_files_of_a_run_that_was_stopped_and_resumed_hold_each_step_once(ran):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = EventAccumulator(str(ran[0] / "terminated" / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in curve] == list(range(1, 9))
    assert [event.value for event in curve] == pytest.approx(ran[1]["resumed"][0]["losses"])


@pytest.mark.parametrize("name", ["data", "code", "config", "settings"])
def test_ranks_that_disagree_say_so_on_all_of_them(ran, name):
    for result in ran[1][f"other {name}"]:
        assert result["error"] == "ConfigError" and f"disagree on the {name}" in result["message"]
        if name in ("data", "code"):
            assert "ranks 0: one; ranks 1: another" in result["message"]


def test_batch_that_the_ranks_cannot_share_is_refused(ran):
    assert "a multiple of the number of ranks" in ran[1]["odd batch"][0]["message"]


def test_checkpoints_of_another_config_are_not_resumed(ran):
    result = ran[1]["changed"][0]
    assert result["error"] == "DriftError"
    assert "optimiser.lr = 0.01" in result["message"] and "optimiser.lr = 0.02" in result["message"]


def test_only_the_last_checkpoints_are_kept_and_nothing_of_the_others(ran):
    folder = ran[0] / "golden" / "checkpoints"
    kept = sorted(path.stem for path in folder.glob("*.json"))
    assert kept == ["000000027", "000000030"]  # an epoch has 5 steps; 27 is half-way
    assert sorted({path.parent.name[:9] for path in folder.glob("files/*/*")}) == kept


def test_best_checkpoint_and_every_nth_are_kept_beside_the_last(ran):
    heads = [line["loss_head"] for line in _lines(ran[0] / "kept", ran[1]["kept"][0])]
    smoothed, weight, means = 0.0, 0.0, []
    for value in heads:
        smoothed, weight = 0.98 * smoothed + 0.02 * value, 0.98 * weight + 0.02
        means.append(smoothed / weight)
    best = min(range(1, 13), key=lambda step: means[step - 1])
    assert best not in (6, 12)
    folder = ran[0] / "kept" / "checkpoints"
    assert sorted(int(path.stem) for path in folder.glob("*.json")) == sorted({6, 12, best})
    assert {int(path.parent.name[:9]) for path in folder.glob("files/*/*")} == {6, 12, best}


def test_minutes_on_one_ranks_clock_save_on_all(ran):
    root, results = ran
    assert {result["step"] for result in results["minutes"]} == {8}
    saved = sorted((root / "minutes" / "checkpoints").glob("*.json"))
    # Only the second rank's clock was put forward, in steps 3 and 6; the last step is saved in any case.
    assert [int(path.stem) for path in saved] == [3, 6, 8]
    assert all(len(storage.read_json(str(path))["files"]) == 3 for path in saved)  # two ranks, and common


@pytest.mark.parametrize(("background", "begins_s"), [(True, 26.0), (False, 56.0)])
def test_minutes_are_over_before_a_step_that_would_end_too_late(monkeypatch, background, begins_s):
    """A minute may be lost: half of it between two saves in the background, and steps take 4 s."""
    checkpoint = SimpleNamespace(background=background)
    trainer = SimpleNamespace(config=SimpleNamespace(checkpoint=checkpoint), _saved_at=100.0, _step_s=4.0)
    for passed_s, due in ((begins_s - 0.1, False), (begins_s + 0.1, True)):
        monkeypatch.setattr(loop.time, "monotonic", lambda passed_s=passed_s: 100.0 + passed_s)
        assert loop.Trainer._seconds_are_due(trainer, 60.0) == due


def test_unknown_loss_to_judge_checkpoints_by_is_refused(ran):
    for result in ran[1]["no such loss"]:
        assert result["error"] == "ConfigError" and "did you mean 'loss_head'" in result["message"]


def test_events_are_in_the_progress_that_status_reads(ran):
    root, results = ran
    progress = storage.read_json(str(root / "recovers" / "progress.json"))
    assert progress["state"] == "done" and progress["metrics"]["loss"] > 0
    assert progress["events"] == results["recovers"][0]["events"]
    assert [event["event"] for event in progress["events"]] == ["step not applied"] * 2 + ["rolled back"]


def _lines(out: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of steps, without events."""
    return [line for line in map(json.loads, _metrics(out, result)) if "loss" in line]


def _metrics(out: Path, result: dict[str, Any]) -> list[str]:
    return [line for part in result["metrics"] for line in (out / part["path"]).read_text().splitlines()]


def _hashes(out: Path, step: int) -> dict[str, str]:
    manifest = storage.read_json(str(out / "checkpoints" / f"{step:09d}.json"))
    return {info["path"].rsplit("/", 1)[1]: info["sha256"] for info in manifest["files"]}
