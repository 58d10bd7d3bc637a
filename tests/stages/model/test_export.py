"""Exports come back as the same model; ONNX files compute what torch computes, at any batch size."""

import importlib.util

import pytest
import torch

from cluster.errors import ConfigError, StepFailed
from stages.model import (
    BackboneConfig,
    Classifier,
    GatheringConfig,
    MaskedFeatureModel,
    MigrationConfig,
    ObjectiveConfig,
    load,
    save_model,
)
from stages.model import export as room
from stages.model.export import export

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra onnx is not installed",
)
BOTH = {"migration": MigrationConfig(), "gathering": GatheringConfig(window=3, tokens=2)}


def config(family="fast_itpn", **more):
    sizes = {"img_size": 64, "embed_dim": 64, "depths": (1, 1, 2), "num_heads": 1}
    return BackboneConfig(family=family, **(sizes | more))


def save(folder, model):
    save_model(folder, model.state_dict(), model.describe())
    return str(folder)


@pytest.mark.parametrize("more", [{}, BOTH], ids=["dense", "accelerated"])
@pytest.mark.parametrize("family", ["fast_itpn", "itpn"])
def test_both_layouts_come_back_as_the_same_model(tmp_path, family, more):
    image = torch.randn(1, 3, 64, 64)
    heads = config(family, num_heads=4, **more)  # not width/64
    classifier = Classifier(heads, 5).eval()
    pretrain = MaskedFeatureModel(heads, ObjectiveConfig(fpn_dim=32, levels="per_level"), 24).eval()
    for model in (classifier, pretrain):  # strong layer scale, so that attention matters
        for parameter in (p for n, p in model.named_parameters() if "gamma" in n):
            torch.nn.init.ones_(parameter)
    for name, model in (("a", classifier), ("b", pretrain)):
        files = export(save(tmp_path / name, model), tmp_path / "out" / name, formats=("itpn", "published"))
        assert [file.path.name for file in files] == ["model.safetensors", "config.json", "published.pth"]
        (tmp_path / "alone").mkdir(exist_ok=True)  # the published file must do without config.json
        published = files[2].path.rename(tmp_path / "alone" / f"{name}.pth")
        for uri in (files[0].path, published):
            again, expected = load(str(uri)).forward_features(image), model.forward_features(image)
            assert set(again) == set(expected)
            assert all(torch.equal(again[level], expected[level]) for level in expected)


@needs_onnx
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("fast_itpn", {}),
        pytest.param("fast_itpn", BOTH, marks=pytest.mark.slow),
        pytest.param("itpn", BOTH, marks=pytest.mark.slow),
    ],
)
def test_onnx_classifier_and_features_agree_with_torch(tmp_path, family, more):
    uri = save(tmp_path / "m", Classifier(config(family, **more), 5, head_init_scale=1.0))
    files = export(uri, tmp_path / "out", formats=("onnx",))
    assert [(f.path.name, f.outputs) for f in files] == [
        ("classifier.onnx", ("logits",)),
        ("features.onnx", ("level4", "level8", "level16")),
    ]
    assert all(f.error < 1e-4 for f in files)


def test_an_export_may_have_other_accelerations_than_the_checkpoint(tmp_path):
    model = Classifier(config(), 5)
    export(save(tmp_path / "m", model), tmp_path / "out", formats=("itpn",), **BOTH)
    found = load(str(tmp_path / "out")).config
    assert {"migration": found.migration, "gathering": found.gathering} == BOTH


@needs_onnx
@pytest.mark.timeout(600)
def test_an_onnx_file_that_gives_no_numbers_does_not_pass(tmp_path):
    model = Classifier(config(), 5)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(StepFailed, match=r"nan(.|\n)*not finite"):
        export(save(tmp_path / "m", model), tmp_path / "out", formats=("onnx",))


@needs_onnx
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_onnx_of_the_pyramid_at_another_size(tmp_path):
    model = MaskedFeatureModel(config(), ObjectiveConfig(fpn_dim=32), 24)
    (features,) = export(save(tmp_path / "m", model), tmp_path / "out", formats=("onnx",), img_size=96)
    assert features.outputs[3:] == ("pyramid4", "pyramid8", "pyramid16") and features.error < 1e-4


def test_wrong_formats_sizes_and_missing_packages_are_named(tmp_path, monkeypatch):
    uri = save(tmp_path / "m", Classifier(config(), 5))
    with pytest.raises(ConfigError, match="itpn, published, onnx"):
        export(uri, tmp_path, formats=("tensorflow",))
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'itpn-pipeline\[onnx\]'"):
        export(uri, tmp_path, formats=("onnx",))
    monkeypatch.undo()
    if importlib.util.find_spec("onnxruntime"):
        with pytest.raises(ConfigError, match="64 or 80"):
            export(uri, tmp_path, formats=("onnx",), img_size=70)
