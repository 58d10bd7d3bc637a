"""ImageNet-ReaL, -V2, -A, -R and -Sketch, on small files in the formats they are published in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.errors import ConfigError, DataInvalid
from stages.artifacts import CheckpointRef, DatasetRef, Outcome
from stages.context import StageContext
from stages.data.class_names import read_class_names
from stages.data.dataset import ShardDataset
from stages.evaluate.label_space import match
from stages.evaluate.real import label_order
from stages.evaluate.stage import run
from stages.evaluate.workbench import Workbench
from tests.stages.evaluate import models
from tests.stages.images import jpeg, picture, shard_folder

WNIDS = [f"n{1440764 + 13 * number:08d}" for number in range(12)]  # in index order, as ImageNet's 1000


def write(root: Path, folders: list[str], name: str = "img_{}.jpg", each: int = 3) -> Path:
    """`root/<folder>/<image>`; images are numbered through, from 1."""
    number = 0
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for _ in range(each):
            number += 1
            (root / folder / name.format(number)).write_bytes(jpeg(picture(number)))
    return root


def shard(tmp_path: Path, source: Path, name: str) -> DatasetRef:
    """As people do with a test set: all of it is the split `val`."""
    return shard_folder(source, tmp_path / "shards", splits=("val",), name=name)


def evaluate(data: DatasetRef, checkpoint: CheckpointRef, out: Path, *evaluators: dict, **values) -> Outcome:
    config = models.config(*(evaluators or [{"kind": "classification"}]), **values)
    return run(config, {"data": data, "checkpoint": checkpoint}, StageContext(out=str(out), attempt="a"))


def logits_and_truth(data: DatasetRef) -> tuple[torch.Tensor, list[str]]:
    """Logits over the 12 classes, and the class folder of every image."""
    images, labels = models.images_and_labels(data, "val")
    classes = ShardDataset.open(data.manifest, "val").classes
    with torch.no_grad():
        return models.classifier(12)(images), [classes[label] for label in labels.tolist()]


def percent(hits: list[bool]) -> float:
    return 100 * sum(hits) / len(hits)


@pytest.fixture
def classifier(tmp_path: Path) -> CheckpointRef:
    data = DatasetRef(name="d", manifest="m", sha256="0", fingerprint="f", splits={}, num_classes=12)
    return models.save_classifier(tmp_path / "model", data, 12, WNIDS)


@pytest.mark.parametrize("published", ["imagenet-a", "imagenet-r"])
def test_subsets_are_judged_among_their_own_classes(classifier, tmp_path, published):
    """ImageNet-A and -R: `<set>/<wnid>/image.jpg` for 200 of the 1000 WordNet ids, and a README beside them."""
    chosen = [WNIDS[i] for i in (0, 1, 5, 9)]
    source = write(tmp_path / published, chosen)
    (source / "README.txt").write_text("n01440790 some name\n")
    data = shard(tmp_path, source, published)
    outcome = evaluate(data, classifier, tmp_path / "out")
    logits, truth = logits_and_truth(data)
    predicted = logits[:, [0, 1, 5, 9]].argmax(1).tolist()
    assert outcome.metrics["top1"] == percent([chosen[p] == t for p, t in zip(predicted, truth, strict=True)])
    among_all = [WNIDS[p] == t for p, t in zip(logits.argmax(1).tolist(), truth, strict=True)]
    assert set(logits.argmax(1).tolist()) - {0, 1, 5, 9}, "the whole head would never leave the subset"
    assert outcome.notes == ["predictions among 4 of the classifier's 12 classes"]
    assert outcome.artifact.samples == 12 and outcome.artifact.dataset == published
    table = json.loads((tmp_path / "out" / outcome.files[0].path).read_text())
    assert [item["class"] for item in table["classes"]] == chosen
    assert {item["predicted"] for item in table["confused"]} <= set(chosen)

    free = evaluate(data, classifier, tmp_path / "free", {"kind": "classification", "restrict": False})
    assert free.metrics["top1"] == percent(among_all) and free.metrics["loss"] > outcome.metrics["loss"]
    assert {m.variant for m in free.artifact.measurements} == {"all classes"}


def test_folders_of_v2_count_as_numbers(classifier, tmp_path):
    """ImageNet-V2: `imagenetv2-matched-frequency-format-val/<class index>/image.jpeg`; 10 comes before 2 by name."""
    source = write(
        tmp_path / "v2" / "imagenetv2-matched-frequency-format-val", [str(i) for i in range(12)], "{}.jpeg"
    )
    data = shard(tmp_path, source.parent, "imagenet-v2")
    assert ShardDataset.open(data.manifest, "val").classes[:4] == ["0", "1", "10", "11"]
    outcome = evaluate(data, classifier, tmp_path / "out")
    logits, truth = logits_and_truth(data)
    hits = [p == int(t) for p, t in zip(logits.argmax(1).tolist(), truth, strict=True)]
    assert outcome.metrics["top1"] == percent(hits) > 0
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(t) for t in truth])).item()
    assert outcome.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert outcome.notes == ["the class folders are numbers: taken as class indices"]


def test_sketch_has_every_class(classifier, tmp_path):
    """ImageNet-Sketch: `sketch/<wnid>/sketch_<number>.JPEG` for all WordNet ids."""
    data = shard(tmp_path, write(tmp_path / "sketch", WNIDS, "sketch_{}.JPEG"), "imagenet-sketch")
    outcome = evaluate(data, classifier, tmp_path / "out")
    logits, truth = logits_and_truth(data)
    assert outcome.metrics["top1"] == percent(
        [WNIDS[p] == t for p, t in zip(logits.argmax(1).tolist(), truth, strict=True)]
    )
    assert not outcome.notes


@pytest.fixture
def validation(tmp_path: Path) -> DatasetRef:
    """ImageNet's validation images, 36 of them, in their class folders."""
    return shard(tmp_path, write(tmp_path / "val", WNIDS, "ILSVRC2012_val_{:08d}.JPEG"), "imagenet-1k")


def test_real_counts_any_of_the_labels_and_leaves_out_images_without(classifier, validation, tmp_path):
    """ReaL: `real.json`, a list with a list of labels for each image in the order of its number."""
    labels = [[] if i % 5 == 0 else [i % 12, (i * 7) % 12] if i % 2 else [(i + 3) % 12] for i in range(36)]
    file = tmp_path / "real.json"
    file.write_text(json.dumps(labels))
    evaluators = ({"kind": "classification"}, {"kind": "real", "labels": str(file)})
    outcome = evaluate(validation, classifier, tmp_path / "out", *evaluators)
    logits, _ = logits_and_truth(validation)
    stored = ShardDataset.open(validation.manifest, "val")
    numbers = [int(stored.key(i).rpartition("_")[2]) - 1 for i in range(36)]
    hits = [p in labels[n] for p, n in zip(logits.argmax(1).tolist(), numbers, strict=True) if labels[n]]
    [real] = [m for m in outcome.artifact.measurements if m.variant == "real"]
    assert (real.metric, real.value, real.samples) == ("top1", percent(hits), 28) and 0 < real.value < 100
    assert real.evaluator["labels_sha256"] and "labels" not in real.evaluator
    assert real.value != outcome.metrics["top1"]


def test_real_labels_follow_the_names_when_the_head_is_in_another_order(validation, tmp_path):
    shuffled = WNIDS[5:] + WNIDS[:5]
    checkpoint = models.save_classifier(tmp_path / "model", validation, 12, shuffled)
    logits, _ = logits_and_truth(validation)
    stored = ShardDataset.open(validation.manifest, "val")
    labels = [[] for _ in range(36)]
    for sample, row in enumerate(logits.argmax(1).tolist()):
        labels[int(stored.key(sample).rpartition("_")[2]) - 1] = [WNIDS.index(shuffled[row])]
    file = tmp_path / "real.json"
    file.write_text(json.dumps(labels))
    outcome = evaluate(validation, checkpoint, tmp_path / "out", {"kind": "real", "labels": str(file)})
    assert outcome.metrics == {"top1": 100.0}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ConfigError, "labels of ImageNet-ReaL are not at"),
        ('{"0": [1]}', DataInvalid, "does not hold the labels of ImageNet-ReaL"),
        ("[[1], 2]", DataInvalid, "does not hold the labels of ImageNet-ReaL"),
        ("not json", DataInvalid, "does not hold the labels of ImageNet-ReaL"),
        ("[[999]]", ConfigError, "does not have the classes of the labels"),
        ("[[1], [2]]", DataInvalid, "has no place in the labels"),
    ],
    ids=["missing", "mapping", "ragged", "text", "classes", "too few"],
)
def test_wrong_labels_of_real_are_told_with_their_origin(
    classifier, validation, tmp_path, content, error, message
):
    file = tmp_path / "real.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(error, match=message) as told:
        evaluate(validation, classifier, tmp_path / "out", {"kind": "real", "labels": str(file)})
    assert told.value.expected and told.value.found
    assert ("github.com/google-research/reassessed-imagenet" in told.value.remedy) == (content != "[[999]]")


def test_pinned_labels_of_real_are_held_to_it(classifier, validation, tmp_path):
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[0]] * 36))
    with pytest.raises(DataInvalid, match="not the file that was pinned") as told:
        evaluate(
            validation, classifier, tmp_path / "o", {"kind": "real", "labels": str(file), "sha256": "0" * 64}
        )
    assert "github.com/google-research/reassessed-imagenet" in (told.value.remedy or "")


def test_real_needs_the_names_of_the_validation_images(classifier, tmp_path):
    data = shard(tmp_path, write(tmp_path / "sketch", WNIDS, "sketch_{}.JPEG"), "imagenet-sketch")
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[0]] * 36))
    with pytest.raises(DataInvalid, match="has no place in the labels") as told:
        evaluate(data, classifier, tmp_path / "out", {"kind": "real", "labels": str(file)})
    assert "ILSVRC2012_val_00000001" in str(told.value)


def test_unknown_classes_are_named(classifier, tmp_path):
    data = shard(tmp_path, write(tmp_path / "other", [WNIDS[0], "n99999999"]), "other")
    with pytest.raises(ConfigError, match="does not know 1 of 2 classes of 'other'") as told:
        evaluate(data, classifier, tmp_path / "out")
    assert "n99999999" in str(told.value.found) and WNIDS[0] in told.value.expected


@pytest.mark.parametrize("name", ["imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch"])
@pytest.mark.parametrize("folder", ["images", "99"])
def test_sets_with_wrong_folders_are_told_where_they_come_from(name, folder):
    with pytest.raises(ConfigError, match=name) as told:
        match(name, [folder], WNIDS, 12)
    assert told.value.expected and told.value.found and "https://github.com/" in told.value.remedy


def test_numbers_that_do_not_count_the_head_are_refused():
    with pytest.raises(ConfigError, match="not those of the classifier's classes") as told:
        match("v2", ["0", "12"], WNIDS, 12)
    assert "0 to 11" in told.value.expected and told.value.found == "2 folders, 0 to 12"


@pytest.mark.parametrize("named", [False, True])
def test_numbers_of_a_larger_head_mean_other_classes_and_are_refused(named):
    """V2's folders count ImageNet-1K's classes: in a head of 21K classes row 7 is something else."""
    folders, rows = [str(i) for i in range(12)], 30
    names = [f"n{i:08d}" for i in range(rows)] if named else None
    with pytest.raises(ConfigError, match="not those of the classifier's classes") as told:
        match("imagenet-v2", folders, names, rows)
    assert "head of 1000" in told.value.expected and "github.com/modestyachts" in told.value.remedy


def test_numbers_follow_the_names_when_the_head_is_in_another_order():
    shuffled = WNIDS[5:] + WNIDS[:5]
    space = match("imagenet-v2", [str(i) for i in range(12)], shuffled, 12)
    assert [shuffled[row] for row in space.index] == WNIDS and space.how == "number"


def test_real_refuses_a_nameless_head_of_more_classes_and_maps_one_with_names(validation, tmp_path):
    """A 21K head has rows enough for labels below 1000, which mean other classes there."""
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[i % 12] for i in range(36)]))
    real = {"kind": "real", "labels": str(file)}
    nameless = models.save_classifier(tmp_path / "nameless", validation, 20)
    with pytest.raises(ConfigError, match="different classes") as told:
        evaluate(validation, nameless, tmp_path / "a", real)
    assert "12 classes" in told.value.expected and told.value.found == 20
    names = [f"n9999999{i}" for i in range(8)] + WNIDS[::-1]
    named = models.save_classifier(tmp_path / "named", validation, 20, names)
    outcome = evaluate(validation, named, tmp_path / "b", real)
    images, _ = models.images_and_labels(validation, "val")
    with torch.no_grad():
        among = models.classifier(20)(images)[:, [names.index(wnid) for wnid in WNIDS]]
    stored = ShardDataset.open(validation.manifest, "val")
    numbers = [int(stored.key(i).rpartition("_")[2]) - 1 for i in range(36)]
    hits = [p == n % 12 for p, n in zip(among.argmax(1).tolist(), numbers, strict=True)]
    assert outcome.metrics["top1"] == percent(hits)
    assert outcome.notes == ["predictions among 12 of the classifier's 20 classes"]


def test_published_weights_get_their_class_names_from_a_file(tmp_path):
    """A published classifier does not name its classes; Kaggle's LOC_synset_mapping.txt does."""
    data = shard(tmp_path, write(tmp_path / "imagenet-a", [WNIDS[3], WNIDS[7]]), "imagenet-a")
    nameless = models.save_classifier(tmp_path / "model", data, 12)
    with pytest.raises(ConfigError, match="different classes") as told:
        evaluate(data, nameless, tmp_path / "out")
    assert "--set evaluate.classes=FILE" in told.value.remedy
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text("".join(f"{wnid} some, names\n" for wnid in WNIDS))
    with pytest.raises(DataInvalid, match="not the file that was pinned"):
        evaluate(data, nameless, tmp_path / "out", classes=str(file), classes_sha256="0" * 64)
    outcome = evaluate(data, nameless, tmp_path / "out", classes=str(file))
    logits, truth = logits_and_truth(data)
    predicted = logits[:, [3, 7]].argmax(1).tolist()
    assert outcome.metrics["top1"] == percent(
        [(WNIDS[3], WNIDS[7])[p] == t for p, t in zip(predicted, truth, strict=True)]
    )


def test_class_names_are_read_from_a_manifest_too(tmp_path):
    data = shard(tmp_path, write(tmp_path / "sketch", WNIDS), "sketch")
    assert read_class_names(data.manifest, 12) == WNIDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file of class names"),
        ("a\nb\n", "does not name the classifier's classes"),
        ("{}", "does not name"),
    ],
)
def test_wrong_files_of_class_names_are_told(tmp_path, content, message):
    file = tmp_path / "classes.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises((ConfigError, DataInvalid), match=message):
        read_class_names(str(file), 12)


def test_numbers_do_not_count_names_that_are_no_wordnet_ids():
    """English names sort in another order than the WordNet ids that V2's folders count."""
    english = ["tench", "goldfish", "great white shark", *(f"fish {i}" for i in range(9))]
    with pytest.raises(ConfigError, match="do not tell which") as told:
        match("imagenet-v2", [str(i) for i in range(12)], english, 12)
    assert "WordNet ids" in told.value.expected and "--classes FILE" in told.value.remedy


def test_classes_of_one_name_are_not_merged():
    birds = ["kite", "crane", "limpkin", "crane"]
    assert match("imagenet-1k", birds, birds, 4).index == (0, 1, 2, 3)
    for classes, names in ((birds[::-1], birds), (birds, birds[:3]), (["kite", "crane"], birds)):
        with pytest.raises(ConfigError, match="told apart") as told:
            match("imagenet-1k", classes, names, len(names))
        assert "crane" in told.value.found


def test_labels_of_real_need_names_that_tell_their_order():
    assert label_order(WNIDS[::-1]) == list(range(12))[::-1]
    numbers = sorted(str(i) for i in range(1000))
    assert [numbers[i] for i in label_order(numbers)] == [str(i) for i in range(1000)]
    more = [f"n{i:08d}" for i in range(1001)]  # ImageNet-21K's ids have another order
    for unclear in (["tench", "goldfish"], [str(i) for i in range(12)], [*numbers[:-1], "1000"], more):
        with pytest.raises(ConfigError, match="do not tell which labels"):
            label_order(unclear)


def test_real_takes_names_of_images_with_the_class_behind_the_number(classifier, tmp_path):
    """As Kaggle's and Hugging Face's copies name them: ILSVRC2012_val_00000001_n01751748."""
    data = shard(tmp_path, write(tmp_path / "val", WNIDS, "ILSVRC2012_val_{:08d}_n01751748.JPEG"), "imagenet")
    file = tmp_path / "real.json"
    file.write_text(json.dumps([list(range(12))] * 36))
    outcome = evaluate(data, classifier, tmp_path / "out", {"kind": "real", "labels": str(file)})
    assert outcome.metrics == {"top1": 100.0}


def test_the_same_weights_with_other_class_names_are_other_results():
    def facts(names: list[str] | None) -> dict[str, str]:
        return Workbench.class_facts(SimpleNamespace(class_names=lambda: names))  # type: ignore[arg-type]

    assert facts(["a", "b"]) == facts(["a", "b"]) != facts(["b", "a"])
    assert facts(None) == {}
