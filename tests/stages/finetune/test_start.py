"""What a fine-tuning starts from: any checkpoint at any size, heads by class name, published files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.finetune.start import start_from
from stages.model import BackboneConfig, Classifier, MaskedFeatureModel, ObjectiveConfig, load, save_model

SMALL = {"embed_dim": 64, "depths": (1, 1, 2), "num_heads": 1}
FAMILIES = ["fast_itpn", "itpn"]


def backbone(size: int = 64, family: str = "fast_itpn") -> BackboneConfig:
    return BackboneConfig(family=family, img_size=size, **SMALL)


def save(folder: Path, model, **config) -> tuple[str, str]:
    save_model(folder, model.state_dict(), model.describe() | config)
    path = folder / "model.safetensors"
    return str(path), storage.sha256_file(path)


def classifier(classes: list[str], size: int = 64):
    model = Classifier(backbone(size), len(classes), head_init_scale=1.0)
    torch.nn.init.normal_(model.head.bias)
    model.classes = tuple(classes)
    return model


def test_head_rows_are_copied_by_class_name(tmp_path: Path) -> None:
    big = classifier(["n00", "n01", "n02", "n03", "n04"])
    small = classifier(["n03", "n99", "n01"])
    before = small.head.weight.detach().clone()
    notes = start_from(small, *save(tmp_path, big), classes=small.classes)
    assert torch.equal(small.head.weight[0], big.head.weight[3])
    assert torch.equal(small.head.weight[2], big.head.weight[1])
    assert torch.equal(small.head.bias[[0, 2]], big.head.bias[[3, 1]])
    assert torch.equal(small.head.weight[1], before[1]), "a class that only we have keeps its initial row"
    assert notes == ["head: 2 of 3 classes copied by name, 1 initialised anew"]


def test_classes_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    birds = ["kite", "crane", "limpkin", "crane"]
    theirs, same, other = classifier(birds), classifier(birds), classifier(["crane", "kite"])
    uri, sha256 = save(tmp_path, theirs)
    start_from(same, uri, sha256, classes=birds)
    assert torch.equal(same.head.weight, theirs.head.weight)
    with pytest.raises(ConfigError, match="told apart") as told:
        start_from(other, uri, sha256, classes=other.classes)
    assert "crane" in told.value.found and "kite" not in told.value.found


def test_equal_number_of_other_classes_does_not_pass_for_the_same_head(tmp_path: Path) -> None:
    theirs, ours = classifier(["a", "b"]), classifier(["b", "c"])
    before = ours.head.weight.detach().clone()
    start_from(ours, *save(tmp_path, theirs), classes=ours.classes)
    assert torch.equal(ours.head.weight[0], theirs.head.weight[1])
    assert torch.equal(ours.head.weight[1], before[1])


def test_classes_come_back_from_disk_and_configs_without_them_still_load(tmp_path: Path) -> None:
    model = classifier(["a", "b"])
    uri, _ = save(tmp_path, model)
    assert load(uri).classes == ("a", "b") and load(uri).describe() == model.describe()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["classes"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(uri).classes is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"classes": ["a"]}))
    with pytest.raises(DataInvalid, match="does not name every class"):
        load(uri)


@pytest.mark.parametrize("size", [384, 512, 640])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_resolution_starts_from_224(tmp_path: Path, family: str, size: int) -> None:
    source = MaskedFeatureModel(backbone(224, family), ObjectiveConfig(fpn_dim=32), 24)
    tables = {n: v for n, v in source.backbone_state_dict().items() if "pos_embed" in n or "bias_table" in n}
    for value in tables.values():
        torch.nn.init.normal_(value)  # in place: these are the source's own
    path = tmp_path / "published.pth"
    torch.save({"model": source.published_state_dict()}, path)
    module = Classifier(backbone(size, family), 3)
    notes = start_from(module, str(path), storage.sha256_file(path), ["a", "b", "c"])
    assert notes[0].startswith(f"resized to {size} px") and len(notes) == 1
    own = module.state_dict()
    for name, value in tables.items():
        # Bicubic, align_corners False, as the published fine-tuning: over the grid, and over its offsets.
        flat, channels = value.reshape(-1, value.shape[-1]), value.shape[-1]
        old = round(len(flat) ** 0.5)
        new = size // 16 if "pos_embed" in name else 2 * (size // 16) - 1
        image = flat.t().reshape(1, channels, old, old)
        wanted = F.interpolate(image, (new, new), mode="bicubic", align_corners=False)
        assert torch.allclose(own[name], wanted[0].flatten(1).t().reshape(own[name].shape), atol=1e-6)
    assert len(tables) == (1 if family == "fast_itpn" else 3)
    assert module.eval()(torch.zeros(1, 3, size, size)).shape == (1, 3)


@pytest.mark.parametrize("key", ["model", "module"])
def test_published_classifier_gives_its_backbone_and_gets_a_new_head(tmp_path: Path, key: str) -> None:
    published = Classifier(backbone(), 7, head_init_scale=1.0)
    path = tmp_path / "fast_itpn.pt"
    torch.save({key: published.state_dict(), "args": argparse.Namespace(lr=1e-4), "epoch": 99}, path)
    torch.manual_seed(5)
    module = Classifier(backbone(96), 3)
    fresh = module.head.weight.detach().clone()
    notes = start_from(module, str(path), storage.sha256_file(path), ["a", "b", "c"])
    assert notes == [
        "resized to 96 px: pos_embed",
        "head: initialised anew for 3 classes (the checkpoint has 7)",
    ]
    assert torch.equal(module.head.weight, fresh) and fresh.abs().max() < 0.001
    assert torch.equal(module.blocks[0].mlp.fc1.weight, published.blocks[0].mlp.fc1.weight)
    assert torch.equal(module.fc_norm.weight, published.fc_norm.weight)


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    uri, _ = save(tmp_path, classifier(["a"]))
    with pytest.raises(DataInvalid, match="not the file that was pinned"):
        start_from(classifier(["a"]), uri, "0" * 64, ["a"])


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_tokens_start_from_a_dense_checkpoint(tmp_path: Path, family: str) -> None:
    dense = MaskedFeatureModel(backbone(64, family), ObjectiveConfig(fpn_dim=32), 24)
    uri, sha256 = save(tmp_path, dense)
    fast = BackboneConfig(
        family=family, img_size=64, migration={"keep": 0.5, "after_block": 1},
        gathering={"window": 2, "tokens": 3}, **SMALL,
    )  # fmt: skip
    module = Classifier(fast, 2).train()
    assert start_from(module, uri, sha256, ["a", "b"]) == []
    assert torch.equal(module.blocks[0].mlp.fc1.weight, dense.backbone.blocks[0].mlp.fc1.weight)
    module(torch.randn(2, 3, 64, 64)).sum().backward()
    assert module.gather_embed.grad is not None and module.gather_embed.grad.abs().sum() > 0
