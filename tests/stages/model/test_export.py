"""Exports come back as the same model; ONNX files compute what torch computes, at any batch size."""

import importlib.util

import pytest
import torch

from cluster.errors import ConfigError
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
    return BackboneConfig(family=family, img_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=1, **more)


def save(folder, model):
    save_model(folder, model.state_dict(), model.describe())
    return str(folder)


@pytest.mark.parametrize("family", ["fast_itpn", "itpn"])
def test_both_layouts_come_back_as_the_same_model(tmp_path, family):
    image = torch.randn(1, 3, 64, 64)
    classifier = Classifier(config(family), 5).eval()
    pretrain = MaskedFeatureModel(config(family), ObjectiveConfig(fpn_dim=32), 24).eval()
    for name, model in (("a", classifier), ("b", pretrain)):
        files = export(save(tmp_path / name, model), tmp_path / "out" / name, formats=("itpn", "published"))
        assert [file.path.name for file in files] == ["model.safetensors", "config.json", "published.pth"]
        (tmp_path / "alone").mkdir(exist_ok=True)  # the published file must do without config.json
        published = files[2].path.rename(tmp_path / "alone" / f"{name}.pth")
        for uri in (files[0].path, published):
            again = load(str(uri)).forward_features(image)
            assert torch.equal(again["level4"], model.forward_features(image)["level4"])


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
