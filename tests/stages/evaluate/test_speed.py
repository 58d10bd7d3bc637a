"""Speed figures of every combination, and accuracy at the same settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigError
from stages.artifacts import DatasetRef, Outcome
from stages.context import StageContext
from stages.evaluate import speed as speeds
from stages.evaluate.config import Acceleration
from stages.evaluate.setting import configure
from stages.evaluate.stage import run
from stages.model import Classifier, accelerated, load_into, save_model
from stages.model.flops import backbone_flops
from tests.stages.evaluate import models
from tests.stages.images import shard_folder, write_image_folder

CLASSES = 5
FIGURES = {"images_per_s", "latency_p50_ms", "latency_p99_ms", "peak_memory_bytes", "flops"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    images = write_image_folder(
        tmp_path_factory.mktemp("images"), classes=CLASSES, train=1, val=4, height=64, width=64
    )
    return shard_folder(images, tmp_path_factory.mktemp("shards"))


def evaluate(dataset: DatasetRef, checkpoint, out: Path, *evaluators: dict) -> Outcome:
    return run(
        models.config(*evaluators),
        {"data": dataset, "checkpoint": checkpoint},
        StageContext(out=str(out), attempt="a"),
    )


def test_every_combination_is_a_set_of_rows_of_its_own(dataset, tmp_path):
    checkpoint = models.save_classifier(tmp_path / "model", dataset, CLASSES)
    sweep = {
        "kind": "speed", "settings": ["off", "migration", "both", {"setting": "migration", "keep": 0.25}],
        "image_sizes": [32, 64], "batch_sizes": [1, 3], "warmup": 1, "iterations": 3,
    }  # fmt: skip
    outcome = evaluate(dataset, checkpoint, tmp_path / "out", sweep)
    rows: dict[str, dict[str, float]] = {}
    for m in outcome.artifact.measurements:
        assert not m.on_data and m.samples == 3 * m.evaluator["batch_size"]
        assert m.evaluator["device"].endswith("thread") and m.evaluator["precision"] == "fp32"
        rows.setdefault(m.variant, {})[m.metric] = m.value
    assert set(rows) == {
        f"{name} {size}px b{batch}"
        for name in ("off", "migration", "both", "migration 0.25") for size in (32, 64) for batch in (1, 3)
    }  # fmt: skip
    for found in rows.values():
        assert set(found) == FIGURES
        assert 0 < found["latency_p50_ms"] <= found["latency_p99_ms"]
        assert found["peak_memory_bytes"] > 10 * 2**20
    plain = rows["off 64px b3"]
    assert (
        plain["images_per_s"] <= 3 / (plain["latency_p50_ms"] / 1e3) * 2
    )  # 2 of 3 passes are not faster than it
    assert (
        plain["flops"]
        == backbone_flops(configure(models.BACKBONE, Acceleration(), 64), 64, 64, CLASSES).total
    )
    assert rows["migration 0.25 64px b1"]["flops"] < rows["migration 64px b1"]["flops"] < plain["flops"]


def test_backbones_without_a_head_have_a_speed_too(dataset, tmp_path):
    checkpoint = models.save_pretrained(tmp_path / "model", dataset)
    speed = {"kind": "speed", "batch_sizes": [2], "warmup": 1, "iterations": 2}
    outcome = evaluate(dataset, checkpoint, tmp_path / "out", speed)
    assert set(outcome.metrics) == FIGURES
    assert {m.variant for m in outcome.artifact.measurements} == {"off 32px b2"}


def test_accuracy_is_measured_at_the_same_settings(dataset, tmp_path):
    checkpoint = models.save_classifier(tmp_path / "model", dataset, CLASSES)
    settings = [
        {},
        {"acceleration": "both"},
        {"image_size": 64},
        {"acceleration": "migration", "image_size": 64},
    ]
    outcome = evaluate(
        dataset, checkpoint, tmp_path / "out", *({"kind": "classification", **s} for s in settings)
    )
    losses = {m.variant: m for m in outcome.artifact.measurements if m.metric == "loss"}
    assert list(losses) == ["", "both", "64px", "migration 64px"]
    assert outcome.metrics["loss"] == losses[""].value
    for variant, size, changes in (
        ("both", 32, {}), ("64px", 64, {"migration": None, "gathering": None}),
        ("migration 64px", 64, {"gathering": None}),
    ):  # fmt: skip
        backbone = accelerated(models.BACKBONE, size).model_copy(update=changes)
        model = Classifier(backbone, CLASSES).eval()
        load_into(model, models.classifier(CLASSES).state_dict())
        if model.gather_embed is not None:
            torch.nn.init.zeros_(model.gather_embed)
        images, labels = models.images_and_labels(dataset, "val", size)
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(model(images), labels).item()
        assert losses[variant].value == pytest.approx(expected, rel=1e-5)
        assert losses[variant].evaluator["view"]["size"] == size
    assert len({m.value for m in losses.values()}) == 4
    names = {Path(info.path).name for info in outcome.files}
    assert names == {
        "classification.json", "classification-both.json", "classification-64px.json",
        "classification-migration-64px.json",
    }  # fmt: skip


def test_what_the_checkpoint_was_trained_with_is_no_variant(dataset, tmp_path):
    trained = accelerated(models.BACKBONE)
    model = models.classifier(CLASSES, trained)
    save_model(tmp_path, model.state_dict(), model.describe())
    checkpoint = models.reference(tmp_path, dataset, "classify")
    evaluators = ({"kind": "classification", "acceleration": name} for name in ("own", "off"))
    found = evaluate(dataset, checkpoint, tmp_path / "out", *evaluators).artifact.measurements
    assert [m.variant for m in found if m.metric == "top1"] == ["", "off"]
    images, labels = models.images_and_labels(dataset, "val")
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert next(m.value for m in found if m.metric == "loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"acceleration": {"setting": "gathering", "keep": 0.5}}, "keep is the share that migration keeps"),
        ({"image_size": 40}, "no multiple of 16"),
    ],
    ids=["keep without migration", "size"],
)
def test_settings_that_cannot_be_are_refused(dataset, tmp_path, values, message):
    checkpoint = models.save_classifier(tmp_path / "model", dataset, CLASSES)
    with pytest.raises(ConfigError, match=message):
        evaluate(dataset, checkpoint, tmp_path / "out", {"kind": "classification", **values})


def test_memory_that_the_system_does_not_tell_is_left_out_with_a_note(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.evaluate.speed._peak_memory", lambda device: lambda: None)
    checkpoint = models.save_classifier(tmp_path / "model", dataset, CLASSES)
    outcome = evaluate(
        dataset, checkpoint, tmp_path / "out", {"kind": "speed", "batch_sizes": [1], "iterations": 1}
    )
    assert set(outcome.metrics) == FIGURES - {"peak_memory_bytes"}
    assert "does not tell a process's peak memory" in outcome.notes[0]


def test_batch_that_does_not_fit_leaves_the_others(dataset, tmp_path, monkeypatch):
    whole = speeds.speed

    def small(forward, *, batch, **values):
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(forward, batch=batch, **values)

    monkeypatch.setattr(speeds, "speed", small)
    checkpoint = models.save_classifier(tmp_path / "model", dataset, CLASSES)
    sweep = {"kind": "speed", "batch_sizes": [1, 4], "warmup": 1, "iterations": 1}
    outcome = evaluate(dataset, checkpoint, tmp_path / "out", sweep)
    assert {m.variant for m in outcome.artifact.measurements} == {"off 32px b1"}
    assert outcome.notes[0].startswith(
        "speed off 32px b4: a batch of 4 images of 32 px does not fit into the memory"
    )


def test_batch_beyond_all_memory_leaves_the_other_rows_of_every_evaluator(dataset, tmp_path):
    """Really: no machine has the 12 TB that these images would take."""
    checkpoint = models.save_classifier(tmp_path / "model", dataset, CLASSES)
    sweep = {"kind": "speed", "batch_sizes": [10**9, 2], "image_sizes": [32], "warmup": 1, "iterations": 1}
    outcome = evaluate(dataset, checkpoint, tmp_path / "out", {"kind": "classification"}, sweep)
    assert {m.variant for m in outcome.artifact.measurements if not m.on_data} == {"off 32px b2"}
    assert outcome.metrics.keys() > FIGURES | {"top1", "loss"}
    [note] = outcome.notes
    assert "batch of 1000000000 images of 32 px" in note and "out of the evaluator's batch_sizes" in note


def test_other_failures_of_a_forward_pass_are_no_lack_of_memory(dataset, tmp_path, monkeypatch):
    def broken(forward, **values):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(speeds, "speed", broken)
    checkpoint = models.save_classifier(tmp_path / "model", dataset, CLASSES)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        evaluate(dataset, checkpoint, tmp_path / "out", {"kind": "speed", "batch_sizes": [1]})
