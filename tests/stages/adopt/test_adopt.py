"""Checkpoints from outside become checkpoints of the graph, verified and in our layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.adopt.config import AdoptConfig, LastConfig
from stages.adopt.outside import config_sha256, examine, weights_file
from stages.adopt.stage import run, run_last
from stages.artifacts import CheckpointRef
from stages.context import StageContext
from stages.finetune.start import start_from
from stages.model import BackboneConfig, Classifier, build_backbone, load, save_model

# A published width: the heads of others cannot be read off a file without config.
SMALL = BackboneConfig(img_size=64, embed_dim=384, depths=(1, 1, 2), num_heads=6)


@pytest.fixture
def published(tmp_path: Path) -> tuple[str, torch.nn.Module, torch.nn.Module]:
    """A published-layout file with last and averaged weights."""
    last, average = Classifier(SMALL, 5), Classifier(SMALL, 5)
    path = tmp_path / "published.pth"
    torch.save({"model": last.state_dict(), "model_ema": average.state_dict(), "epoch": 3}, path)
    return str(path), last, average


@pytest.mark.parametrize("ema", [False, True])
def test_published_file_is_written_in_our_layout(published, tmp_path: Path, ema: bool) -> None:
    uri, last, average = published
    found = examine(uri, ema=ema)
    context = StageContext(out=str(tmp_path / "out"), attempt="a")
    outcome = run(AdoptConfig(uri=uri, sha256=found.sha256, ema=ema), {}, context)
    artifact = outcome.artifact
    assert isinstance(artifact, CheckpointRef) and artifact.task == "classify"
    assert storage.sha256_file(artifact.uri) == artifact.sha256 != found.sha256
    again, wanted = load(artifact.uri, sha256=artifact.sha256), average if ema else last
    assert all(torch.equal(again.state_dict()[n], v) for n, v in wanted.state_dict().items())
    assert again.config == SMALL
    assert found.sha256 in outcome.notes[0] and uri in outcome.notes[0]
    for info in outcome.files:
        assert storage.sha256_file(tmp_path / "out" / info.path) == info.sha256


def test_other_bytes_than_the_pinned_are_refused(published, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="not the file that was pinned"):
        run(AdoptConfig(uri=published[0], sha256="0" * 64), {}, StageContext(out=str(tmp_path / "out")))


def test_unnamed_checkpoint_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uri none, sha256 none"):
        run(AdoptConfig(), {}, StageContext(out=str(tmp_path)))


def reference(folder: Path, **more) -> CheckpointRef:
    model = Classifier(SMALL, 3)
    save_model(folder, model.state_dict(), model.describe())
    path = folder / "model.safetensors"
    facts = {"uri": str(path), "sha256": storage.sha256_file(path), "bytes": path.stat().st_size, "seed": 4}
    facts |= {"step": 40, "task": "classify", "dataset": "pets", "data_fingerprint": "f" * 64}
    return CheckpointRef(**(facts | more))


def test_what_a_registry_knows_of_it_stays_its_lineage(tmp_path: Path) -> None:
    known = reference(tmp_path / "in", teacher_sha256="t" * 64)
    config = AdoptConfig(
        uri=known.uri, sha256=known.sha256, config_sha256=config_sha256(known.uri), known=known
    )
    found = run(config, {}, StageContext(out=str(tmp_path / "out"))).artifact
    assert isinstance(found, CheckpointRef) and found.uri != known.uri
    same = {"dataset", "data_fingerprint", "seed", "step", "teacher_sha256", "task"}
    assert all(getattr(found, name) == getattr(known, name) for name in same)


def test_last_weights_beside_the_averaged_ones_become_a_checkpoint(tmp_path: Path) -> None:
    averaged = reference(tmp_path / "tuned")
    last = reference(tmp_path / "tuned" / "raw")
    found = run_last(LastConfig(), {"checkpoint": averaged}, StageContext(out=str(tmp_path / "out"))).artifact
    assert isinstance(found, CheckpointRef)
    assert found.sha256 == last.sha256 == storage.sha256_file(found.uri) and found.sha256 != averaged.sha256
    assert found.dataset == averaged.dataset and load(found.uri).num_classes == 3


def test_fine_tuning_without_an_average_has_no_other_last_weights(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="ema_decay above 0"):
        run_last(LastConfig(), {"checkpoint": reference(tmp_path)}, StageContext(out=str(tmp_path / "out")))


def test_a_folder_or_a_file_names_weights(tmp_path: Path) -> None:
    reference(tmp_path / "model")
    assert weights_file(str(tmp_path / "model")) == str(tmp_path / "model/model.safetensors")
    assert weights_file(str(tmp_path / "absent.pth")) is None and weights_file(str(tmp_path)) is None


def test_parts_without_a_place_are_left_out_and_named(tmp_path: Path) -> None:
    state = build_backbone(SMALL).state_dict()
    path = tmp_path / "backbone.pth"
    torch.save({"module": state | {"mask_token": torch.zeros(1, 1, 256)}}, path)
    config = AdoptConfig(uri=str(path), sha256=storage.sha256_file(path))
    outcome = run(config, {}, StageContext(out=str(tmp_path / "out")))
    assert outcome.notes[1] == "left out, since a backbone has no place for it: mask_token"
    found = load(outcome.artifact.uri).state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[n], v) for n, v in state.items())


def test_another_config_beside_the_same_weights_is_another_checkpoint(tmp_path: Path) -> None:
    known = reference(tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    first = examine(known.uri)
    pinned = AdoptConfig(uri=known.uri, sha256=first.sha256, config_sha256=first.config_sha256)
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    second = examine(known.uri)
    assert second.sha256 == first.sha256
    other = AdoptConfig(uri=known.uri, sha256=second.sha256, config_sha256=second.config_sha256)
    assert other.identity() != pinned.identity()
    with pytest.raises(DataInvalid, match="not the one that was pinned"):
        run(pinned, {}, StageContext(out=str(tmp_path / "a")))
    with pytest.raises(ConfigError, match=r"config.json .* is not pinned") as told:
        run(AdoptConfig(uri=known.uri, sha256=first.sha256), {}, StageContext(out=str(tmp_path / "b")))
    assert f"config_sha256={second.config_sha256}" in told.value.remedy
    found = run(other, {}, StageContext(out=str(tmp_path / "c"))).artifact
    assert load(found.uri).normalisation.mean == (0.5, 0.5, 0.5)
    file.unlink()
    with pytest.raises(DataInvalid, match="not the one that was pinned"):
        run(other, {}, StageContext(out=str(tmp_path / "d")))


def adopt_with(classes: Path, published: str, **values: str) -> AdoptConfig:
    facts = {"sha256": storage.sha256_file(published), "classes_sha256": storage.sha256_file(classes)}
    return AdoptConfig(uri=published, classes=str(classes), **(facts | values))


def test_named_head_of_a_published_file_is_mapped_to_fewer_classes_by_wnid(published, tmp_path: Path) -> None:
    """21K -> 1K in small: five classes that the file does not name, of which fine-tuning has two and a new one."""
    uri, last, _ = published
    classes = tmp_path / "imagenet21k_wnids.txt"
    classes.write_text("n00000004\nn00000001 a name\nn00000007\n\nn00000002\nn00000009\n")
    config = adopt_with(classes, uri)
    assert config.identity() != AdoptConfig(uri=uri, sha256=config.sha256).identity()
    moved = config.model_copy(update={"classes": "elsewhere.txt"})
    assert moved.identity() == config.identity(), "where it lies is not what it says"
    taken = run(config, {}, StageContext(out=str(tmp_path / "out"), attempt="a")).artifact
    ours = ("n00000001", "n00000003", "n00000009")
    module = Classifier(SMALL, 3)
    fresh = module.head.weight.detach().clone()
    notes = start_from(module, taken.uri, taken.sha256, ours)
    assert notes == ["head: 2 of 3 classes copied by name, 1 initialised anew"]
    assert torch.equal(module.head.weight[[0, 2]], last.head.weight[[1, 4]])
    assert torch.equal(module.head.bias[[0, 2]], last.head.bias[[1, 4]])
    assert torch.equal(module.head.weight[1], fresh[1])


def test_wrong_files_of_class_names_are_refused(published, tmp_path: Path) -> None:
    uri = published[0]
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\nc\n")
    out = StageContext(out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="does not name the classifier's classes") as told:
        run(adopt_with(classes, uri), {}, out)
    assert "5 different names" in told.value.expected and "3 names" in told.value.found
    with pytest.raises(DataInvalid, match="not the file that was pinned"):
        run(adopt_with(classes, uri, classes_sha256="0" * 64), {}, out)
    with pytest.raises(ConfigError, match=r"classes.txt is not pinned"):
        run(adopt_with(classes, uri, classes_sha256=""), {}, out)
    backbone = tmp_path / "backbone.pth"
    torch.save({"model": build_backbone(SMALL).state_dict()}, backbone)
    with pytest.raises(ConfigError, match="no classes to name"):
        run(adopt_with(classes, str(backbone)), {}, out)


def test_names_other_than_the_checkpoints_own_are_refused(tmp_path: Path) -> None:
    model = Classifier(SMALL, 2)
    model.classes = ("a", "b")
    save_model(tmp_path / "in", model.state_dict(), model.describe())
    uri = str(tmp_path / "in" / "model.safetensors")
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nc\n")
    config = adopt_with(classes, uri, config_sha256=config_sha256(uri))
    with pytest.raises(ConfigError, match="other classes than the checkpoint's own") as told:
        run(config, {}, StageContext(out=str(tmp_path / "out")))
    assert told.value.expected == "class 1 is b" and told.value.found == "c"
