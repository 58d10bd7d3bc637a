"""The registry appends once, reads everything, and finds the best."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from pipeline.registry import Registry, ResultRow, results_of
from pipeline.registry.rules import check_rule
from pipeline.runner import Runner
from stages.artifacts import Measurement
from tests.pipeline import toys


@pytest.fixture
def root(tmp_path: Path) -> str:
    Runner(str(tmp_path), "toy", toys.chain(), open_session=toys.ThreadSession).run()
    return str(tmp_path)


def test_rows_carry_the_whole_lineage(root: str) -> None:
    rows = Registry(root).results(metric="top1")
    assert [(r.init, r.value, r.pretrain) for r in sorted(rows, key=lambda r: r.init)] == [
        ("pretrained", 3.0, "p"),
        ("scratch", 1.0, None),
    ]
    for row in rows:
        assert storage.exists(row.checkpoint)
        assert row.run == "toy" and row.step.startswith("evaluate/") and row.data_fingerprint == "d" * 64
        assert row.training_fingerprint and row.code_version and row.created_at


def test_publishing_a_record_twice_adds_nothing(root: str) -> None:
    registry = Registry(root)
    records = [s.record for s in Runner(root, "toy", toys.chain()).plan() if s.record]
    assert len(records) == 4
    assert registry.publish(records) == 0
    assert len(registry.results()) == 4
    assert len(registry.checkpoints()) == 2


def test_best_is_highest_accuracy_and_lowest_loss(root: str) -> None:
    assert Registry(root).best("top1").value == 3.0
    assert Registry(root).best("loss").value == -3.0


def test_best_of_an_unknown_metric_names_the_nearest(root: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'top1'"):
        Registry(root).best("top2")


def test_unknown_filter_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'dataset'"):
        Registry(root).results(datset="x")


def test_unreadable_event_is_named(root: str) -> None:
    storage.write_exclusive(f"{root}/registry/results/zz.json", b'{"half": ')
    with pytest.raises(DataInvalid, match=r"results/zz\.json"):
        Registry(root).results()


def test_same_evaluation_from_elsewhere_adds_nothing(root: str) -> None:
    registry = Registry(root)
    [first] = registry.results(metric="top1", init="scratch")
    elsewhere = {
        "run": "other",
        "step": "evaluate/b/v2",
        "created_at": "2030",
        "code_version": "later",
        "checkpoint": "/copy",
    }
    again = first.model_copy(update=elsewhere | {"value": 2.0})
    assert registry.append([("results", again)]) == 0
    assert registry.results(metric="top1", init="scratch") == [first]


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_sha256": "0" * 64},
        {"model_fingerprint": "2" * 64},
        {"evaluator": {"value": 2.0}},
        {"evaluated_fingerprint": "1" * 64},
        {"metric": "top5"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_weights_evaluator_data_or_metric_make_another_row(root: str, change: dict) -> None:
    registry = Registry(root)
    content = registry.results(metric="top1")[0].model_dump(exclude={"evaluator_fingerprint"})
    assert registry.append([("results", ResultRow(**content | change))]) == 1


def test_rows_tell_training_data_from_evaluated_data(root: str) -> None:
    for row in Registry(root).results():
        assert (row.data_fingerprint, row.evaluated_fingerprint) == ("d" * 64, "e" * 64)
        assert row.evaluator_fingerprint == storage.sha256_bytes(storage.canonical_json(row.evaluator))


def test_figures_that_no_data_decide_belong_to_any_data(root: str) -> None:
    record = next(
        s.record for s in Runner(root, "toy", toys.chain()).plan() if s.record and s.step.kind == "evaluate"
    )
    speed = Measurement(
        metric="images_per_s",
        value=9.0,
        samples=64,
        evaluator={"kind": "speed"},
        variant="b64",
        on_data=False,
    )
    artifact = record.artifact.model_copy(update={"measurements": [speed]})
    [row] = results_of([record.model_copy(update={"artifact": artifact})])
    assert (row.dataset, row.split, row.evaluated_fingerprint) == ("any", "any", None)
    assert (row.samples, row.variant, row.evaluator) == (64, "b64", {"kind": "speed"})


def test_events_of_the_first_schema_keep_their_ids(root: str) -> None:
    """Written by version 0.1.0 as it was: the id is what that version computed."""
    old = {
        "schema_version": 1, "run": "demo", "step": "evaluate/demo-scratch-s0/v1", "code_version": "abc",
        "created_at": "2026-01-01T00:00:00.000+00:00", "dataset": "clipart-12", "split": "val", "metric": "top1",
        "value": 29.5, "samples": 439, "init": "scratch", "seed": 0, "evaluator": {"split": "val"},
        "checkpoint": "/r/model.safetensors", "checkpoint_sha256": "ab" * 32, "pretrain": None,
        "training_fingerprint": "cd" * 32, "data_fingerprint": "ef" * 32,
    }  # fmt: skip
    name = "2d29b5488889b8b0cafd17bae48b34ef"
    storage.write_json_exclusive(f"{root}/registry/results/{name}.json", old)
    [row] = [row for row in Registry(root).results() if row.schema_version == 1]
    assert row.id == name and row.variant == "" and row.evaluated_fingerprint is None
    assert Registry(root).results().to_arrow().num_rows == 5


def test_events_from_before_the_models_description_was_told_keep_their_ids(root: str) -> None:
    """The id is what the version before computed."""
    old = {
        "schema_version": 2, "run": "demo", "step": "evaluate/demo-scratch-s0/v1", "code_version": "abc",
        "created_at": "2026-01-01T00:00:00.000+00:00", "dataset": "clipart-12", "split": "val", "metric": "top1",
        "value": 29.5, "samples": 439, "init": "scratch", "seed": 0, "variant": "", "evaluator": {"split": "val"},
        "evaluator_fingerprint": "aa" * 32, "evaluated_fingerprint": "ee" * 32,
        "checkpoint": "/r/model.safetensors", "checkpoint_sha256": "ab" * 32, "pretrain": None,
        "training_fingerprint": "cd" * 32, "data_fingerprint": "ef" * 32,
    }  # fmt: skip
    name = "c37bac06e5525fa8a0368851a4edca6a"
    storage.write_json_exclusive(f"{root}/registry/results/{name}.json", old)
    [row] = Registry(root).results(evaluator_fingerprint="aa" * 32)
    assert row.id == name and row.model_fingerprint is None
    assert Registry(root).append([("results", row)]) == 0


def test_variants_stay_out_of_best_and_of_rules(root: str) -> None:
    registry = Registry(root)
    [plain] = registry.results(metric="top1", init="scratch")
    better = ResultRow(**plain.model_dump(exclude={"evaluator_fingerprint"}) | {
        "variant": "real", "evaluator": {"kind": "real"}, "value": 99.0, "created_at": "2999",
    })  # fmt: skip
    registry.append([("results", better)])
    assert registry.best("top1").value == 3.0
    assert registry.best("top1", variant="real").value == 99.0
    verdict = check_rule("toy/val/top1 >= 50", plain.checkpoint_sha256, registry.results(), {})
    assert not verdict.holds and verdict.text == "top1 1 against 50"


def test_values_that_are_not_finite_are_no_measurements() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Measurement(metric="loss", value=float("nan"))
