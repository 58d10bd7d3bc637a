"""Evaluation: exact on any number of processes, and equal to a straightforward computation and to scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch

from cluster.errors import ConfigError
from stages.artifacts import DatasetRef, Outcome
from stages.context import StageContext
from stages.data.dataset import ShardDataset
from stages.evaluate.classification import ClassificationMeter, rank_of_label
from stages.evaluate.config import Classification, EvaluateConfig
from stages.evaluate.label_space import match
from stages.evaluate.stage import run
from stages.model import save_model
from tests.stages.evaluate import models
from tests.stages.images import shard_folder, write_image_folder
from tests.stages.train import ranks

pytestmark = pytest.mark.timeout(600)  # several processes; a busy machine starts them slowly

CLASSES = 7
# In ReaL's labels every fourth image has none, and the others have one of the seven classes or two.
REAL = [[] if i % 4 == 0 else [i % CLASSES, (3 * i) % CLASSES] for i in range(35)]


PLAIN = ("top1", "top5", "loss", "ece", "mean_class_top1", "worst_class_top1", "knn_top1", "linear_top1")
SPEED = ("images_per_s", "latency_p50_ms", "latency_p99_ms", "peak_memory_bytes", "flops")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    """7 classes and 35 images in each split: neither 2 nor 3 processes share them evenly, nor do batches of 4.

    The images of `val` bear the names of ImageNet's, the folders WordNet ids.
    """
    images = write_image_folder(tmp_path_factory.mktemp("images"), classes=CLASSES, train=5, val=5)
    for folder in images.glob("*/class_*"):
        folder.rename(folder.with_name(f"n{int(folder.name.removeprefix('class_')):08d}"))
    for number, path in enumerate(sorted((images / "val").rglob("*.jpg")), 1):
        path.rename(path.with_name(f"ILSVRC2012_val_{number:08d}.JPEG"))
    return shard_folder(images, tmp_path_factory.mktemp("shards"), shard_samples=8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, dataset):
    return models.save_classifier(tmp_path_factory.mktemp("classifier"), dataset, CLASSES)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EvaluateConfig:
    """Every evaluator."""
    labels = tmp_path_factory.mktemp("labels") / "real.json"
    labels.write_text(json.dumps(REAL))
    return models.config(
        {"kind": "classification"}, {"kind": "real", "labels": str(labels)}, {"kind": "knn", "k": 5},
        {"kind": "linear", "l2": 0.1}, {"kind": "speed", "batch_sizes": [2], "warmup": 1, "iterations": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dataset, classifier, config) -> Outcome:
    context = StageContext(out=str(tmp_path_factory.mktemp("alone")), attempt="a")
    return run(config, {"data": dataset, "checkpoint": classifier}, context)


@pytest.fixture(scope="module")
def logits_and_labels(dataset) -> tuple[np.ndarray, np.ndarray]:
    images, labels = models.images_and_labels(dataset, "val")
    with torch.no_grad():
        return models.classifier(CLASSES)(images).numpy(), labels.numpy()


@pytest.fixture(scope="module")
def table(alone, tmp_path_factory) -> dict:
    [info] = alone.files
    return json.loads((Path(alone.artifact.checkpoint.uri).parents[1] / "alone0" / info.path).read_text())


def test_figures_equal_scikit_learn(alone, logits_and_labels):
    logits, labels = logits_and_labels
    probability = torch.tensor(logits).double().softmax(1).numpy()
    every = np.arange(CLASSES)
    recalls = sklearn.metrics.recall_score(
        labels, logits.argmax(1), average=None, labels=every, zero_division=0
    )
    expected = {
        "top1": 100 * sklearn.metrics.accuracy_score(labels, logits.argmax(1)),
        "top5": 100 * sklearn.metrics.top_k_accuracy_score(labels, logits, k=5, labels=every),
        "loss": sklearn.metrics.log_loss(labels, probability, labels=every),
        "mean_class_top1": 100 * sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1)),
        "worst_class_top1": 100 * recalls.min(),
    }
    assert {name: alone.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert alone.artifact.samples == 35 and 0 < expected["top1"] < expected["top5"] < 100


def test_calibration_error_follows_its_definition(alone, logits_and_labels, table):
    logits, labels = logits_and_labels
    probability = torch.tensor(logits).double().softmax(1).numpy()
    confidence, hit = probability.max(1), probability.argmax(1) == labels
    expected, filled = 0.0, 0
    for m in range(15):
        chosen = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if chosen.any():
            expected += chosen.mean() * abs(hit[chosen].mean() - confidence[chosen].mean())
            filled += 1
    assert alone.metrics["ece"] == pytest.approx(expected, rel=1e-5) and filled > 2
    assert sum(item["samples"] for item in table["calibration"]) == 35


def test_file_lists_every_class_and_the_confusions(alone, logits_and_labels, table, dataset):
    logits, labels = logits_and_labels
    names = ShardDataset.open(dataset.manifest, "val").classes
    matrix = sklearn.metrics.confusion_matrix(labels, logits.argmax(1), labels=np.arange(CLASSES))
    assert [item["class"] for item in table["classes"]] == names
    assert [item["samples"] for item in table["classes"]] == matrix.sum(1).tolist()
    assert [item["top1"] for item in table["classes"]] == pytest.approx(
        100 * matrix.diagonal() / matrix.sum(1)
    )
    found = {(item["class"], item["predicted"]): item["samples"] for item in table["confused"]}
    pairs = [(i, j) for i in range(CLASSES) for j in range(CLASSES) if i != j and matrix[i, j]]
    assert found == {(names[i], names[j]): matrix[i, j] for i, j in pairs}
    assert [item["samples"] for item in table["confused"]] == sorted(found.values(), reverse=True)
    assert table["evaluator"] == alone.artifact.measurements[0].evaluator


@pytest.mark.parametrize("world_size", [2, 3])
def test_counts_are_exact_on_uneven_shares(alone, dataset, classifier, config, tmp_path, world_size):
    spec = {
        "out": str(tmp_path / "out"), "ranks": world_size, "result": str(tmp_path / "result"),
        "config": config.model_dump(mode="json"),
        "inputs": {"data": dataset.model_dump(), "checkpoint": classifier.model_dump()},
    }  # fmt: skip
    codes = ranks.run(world_size, spec, tmp_path, script=Path(__file__).with_name("rank.py"))
    assert codes == [0] * world_size, ranks.errors(tmp_path)
    found = Outcome.model_validate_json((tmp_path / "result").read_text())
    values, expected = (
        {(m.metric, m.variant): m.value for m in outcome.artifact.measurements if m.on_data}
        for outcome in (found, alone)
    )
    assert set(values) == {(name, "") for name in PLAIN} | {("top1", "real")}
    for key in (("loss", ""), ("ece", "")):
        assert values.pop(key) == pytest.approx(expected.pop(key), rel=1e-4)
    assert values == expected
    assert [(m.samples, m.evaluator) for m in found.artifact.measurements] == [
        (m.samples, m.evaluator) for m in alone.artifact.measurements
    ]
    mine, theirs = (
        json.loads((Path(folder) / outcome.files[0].path).read_text())
        for folder, outcome in (
            (tmp_path / "out", found),
            (Path(classifier.uri).parents[1] / "alone0", alone),
        )
    )
    assert mine["classes"] == theirs["classes"] and mine["confused"] == theirs["confused"]


def test_measurements_say_what_decides_them(alone, dataset):
    by_metric = {m.metric: m for m in alone.artifact.measurements}
    assert set(PLAIN) | set(SPEED) == set(by_metric)
    assert alone.artifact.data_fingerprint == dataset.fingerprint
    evaluator = by_metric["knn_top1"].evaluator
    assert evaluator == {
        "kind": "knn", "train_split": "train", "k": 5, "temperature": 0.07, "split": "val", "precision": "fp32",
        "view": {"kind": "eval", "size": 32, "crop_pct": 1.0}, "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225], "acceleration": {"migration": None, "gathering": None},
    }  # fmt: skip
    assert {m.variant for m in alone.artifact.measurements} == {"", "real", "off 32px b2"}
    assert {m.samples for m in alone.artifact.measurements if m.variant == "real"} == {26}


def test_broken_weights_score_nothing_and_are_told(dataset, tmp_path):
    model = models.classifier(CLASSES)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    save_model(tmp_path, model.state_dict(), model.describe())
    broken = models.reference(tmp_path, dataset, "classify")
    only = models.config({"kind": "classification"})
    outcome = run(only, {"data": dataset, "checkpoint": broken}, StageContext(out=str(tmp_path / "out")))
    assert outcome.metrics["top1"] == outcome.metrics["top5"] == 0
    assert not {"loss", "ece"} & {m.metric for m in outcome.artifact.measurements}
    assert [note for note in outcome.notes if note.startswith("loss is nan: it is not recorded")]
    written = json.loads((tmp_path / "out" / outcome.files[0].path).read_text())
    assert {item["predicted"] for item in written["confused"]} == {"(not finite)"}


def test_equal_evaluators_are_one_and_others_have_files_of_their_own(dataset, classifier, tmp_path):
    asked = (
        {"kind": "classification"},
        {"kind": "classification", "acceleration": "off"},
        {"kind": "classification", "ece_bins": 30},
    )
    outcome = run(
        models.config(*asked),
        {"data": dataset, "checkpoint": classifier},
        StageContext(out=str(tmp_path), attempt="a"),
    )
    assert [m.evaluator["ece_bins"] for m in outcome.artifact.measurements if m.metric == "ece"] == [15, 30]
    files = {Path(info.path).name: json.loads((tmp_path / info.path).read_text()) for info in outcome.files}
    assert {name: len(table["calibration"]) for name, table in files.items()} == {
        "classification.json": 15, "classification-2.json": 30,
    }  # fmt: skip


def test_classifier_of_other_classes_is_refused(dataset, config, tmp_path):
    wrong = models.save_classifier(tmp_path, dataset, 5)
    with pytest.raises(ConfigError, match="different classes") as error:
        run(config, {"data": dataset, "checkpoint": wrong}, StageContext(out=str(tmp_path / "out")))
    assert "found:    5" in str(error.value)


def test_pretrained_checkpoint_has_no_classes_to_count(dataset, config, tmp_path):
    backbone = models.save_pretrained(tmp_path, dataset)
    with pytest.raises(ConfigError, match="'classification' needs a classifier") as error:
        run(config, {"data": dataset, "checkpoint": backbone}, StageContext(out=str(tmp_path / "out")))
    assert "knn" in error.value.remedy


def test_unknown_kind_or_field_of_an_evaluator_is_named():
    with pytest.raises(ConfigError, match="'knn'"):
        models.config({"kind": "kmeans"})
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        models.config({"kind": "knn", "temprature": 1.0})


def test_ties_and_broken_logits_never_count_as_hits_by_luck():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [float("nan"), 0.0, 0.0], [0.0, 0.0, 3.0]])
    assert rank_of_label(logits, torch.tensor([0, 1, 0, 2])).tolist() == [0, 1, 3, 0]


def test_a_lost_sample_is_noticed():
    space = match("d", ["a", "b"], None, 2)
    meter = ClassificationMeter(Classification(), space, ["a", "b"], device="cpu", samples=3)
    with pytest.raises(AssertionError, match="saw 0 of 3"):
        list(meter.finish())
