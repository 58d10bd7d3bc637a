"""Saving, loading and the strict report."""

import argparse
import functools
import http.server
import json
import pickle
import threading
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError, DataInvalid
from cluster.hashing import sha256_file
from stages.adopt.outside import examine, weights_file
from stages.model import (
    BackboneConfig,
    Classifier,
    GatheringConfig,
    MaskedFeatureModel,
    MigrationConfig,
    Normalisation,
    ObjectiveConfig,
    TeacherConfig,
    backbone_config,
    build_backbone,
    load,
    load_backbone_into,
    load_into,
    load_teacher,
    save_model,
)
from stages.model.teacher import find_files

SMALL = {"img_size": 64, "embed_dim": 64, "depths": (1, 1, 4), "num_heads": 1}
CLIP = Path(__file__).parents[2] / "parity" / "data" / "clip_teacher.safetensors"
FAMILIES = ["fast_itpn", "itpn"]


def config(family="fast_itpn", **more):
    return BackboneConfig(family=family, **(SMALL | more))


def pretrain(family="fast_itpn", **more):
    return MaskedFeatureModel(config(family, **more), ObjectiveConfig(fpn_dim=32), 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_classifier_comes_back_from_disk_with_named_levels(tmp_path, family):
    model = Classifier(config(family), 5).eval()
    save_model(tmp_path, model.state_dict(), model.describe())
    image = torch.randn(2, 3, 64, 96)
    for uri in (tmp_path, tmp_path / "model.safetensors"):
        again = load(str(uri))
        assert torch.equal(again(image), model(image))
    shapes = {name: tuple(value.shape[1:]) for name, value in again.forward_features(image).items()}
    assert shapes == {
        "level4": (16, 16, 24),
        "level8": (32, 8, 12),
        "level16": (64, 4, 6),
        "tokens": (24, 64),
    }


@pytest.mark.parametrize("make", [lambda: Classifier(config(), 2), pretrain], ids=["classifier", "pretrain"])
def test_the_inputs_normalisation_travels_with_the_weights(tmp_path, make):
    model = make()
    save_model(tmp_path / "unknown", model.state_dict(), model.describe())
    assert load(str(tmp_path / "unknown")).normalisation is None
    model.normalisation = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_model(tmp_path / "known", model.state_dict(), model.describe())
    assert load(str(tmp_path / "known")).normalisation == model.normalisation


@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_model_comes_back_with_pyramid_levels(tmp_path, family):
    model = pretrain(family)
    save_model(tmp_path, model.state_dict(), model.describe())
    again = load(str(tmp_path))
    features = again.forward_features(torch.randn(1, 3, 64, 64))
    assert tuple(features["pyramid4"].shape) == (1, 32, 16, 16)
    assert again.objective == model.objective


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_starts_from_a_pretrained_backbone_at_another_size(family):
    source = pretrain(family)
    target = Classifier(config(family, img_size=96), 5)
    report = load_backbone_into(target, source.state_dict())
    assert sorted(report.missing) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert report.unexpected == []
    tables = 1 if family == "fast_itpn" else 5
    assert len(report.resized) == tables and report.resized[0].endswith("pos_embed")
    assert torch.equal(target.blocks[0].mlp.fc1.weight, source.backbone.blocks[0].mlp.fc1.weight)
    assert load_backbone_into(target, source.backbone_state_dict()).unexpected == []


def test_head_of_another_shape_is_dropped_and_reported():
    report = load_backbone_into(Classifier(config(), 7), Classifier(config(), 5).state_dict())
    assert report.dropped == ["head.weight", "head.bias"]
    assert report.missing == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: s.pop("blocks.0.norm2.weight"), "missing: blocks.0.norm2.weight"),
        (lambda s: s.update({"blocks.9.norm2.weight": torch.zeros(64)}), "unexpected: blocks.9.norm2.weight"),
        (lambda s: s.update({"blocks.0.norm2.weight": torch.zeros(3)}), "another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(damage, words):
    model = Classifier(config(), 5)
    state = model.state_dict()
    damage(state)
    with pytest.raises(DataInvalid, match=words):
        load_backbone_into(model, state)


def published(**more):
    """A classifier of a published width, whose heads shapes tell."""
    return Classifier(config(**({"embed_dim": 384, "depths": (1, 1, 1), "num_heads": 6} | more)), 5).eval()


@pytest.mark.parametrize(("outer", "ema"), [("model", False), ("module", False), ("model_ema", True)])
def test_published_checkpoints_load_by_their_shapes_alone(tmp_path, outer, ema):
    model = published(bridge_mlp_ratio=2.0, mlp_ratio=8 / 3)
    best = np.float64(86.2)
    content = {outer: model.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3, "best": best}
    torch.save(content, tmp_path / "published.pth")
    again = load(str(tmp_path / "published.pth"), ema=ema)
    assert again.config.depths == (1, 1, 1) and again.num_classes == 5
    assert again.config.bridge_mlp_ratio == 2
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(image), model(image))
    assert again.load_report.missing == [] and again.load_report.dropped == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_prefix_of_a_distributed_wrapper_is_taken_off(tmp_path, suffix):
    model = published()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / f"a{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    assert torch.equal(load(str(path)).head.weight, model.head.weight)


def test_heads_that_shapes_do_not_tell_are_not_guessed(tmp_path):
    model = Classifier(backbone_config("fast_itpn_micro"), 5)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(
        DataInvalid, match=r"heads cannot be read off weights of width 128(.|\n)*384, 512, 768"
    ):
        load(str(tmp_path / "a.pth"))
    (tmp_path / "config.json").write_text(json.dumps(model.describe()))
    assert load(str(tmp_path / "a.pth")).config.num_heads == 4
    other = Classifier(
        config("itpn", embed_dim=128, num_heads=4), 5
    )  # its bias tables have a column for each
    torch.save({"model": other.state_dict()}, tmp_path / "itpn.pth")
    (tmp_path / "config.json").unlink()
    assert load(str(tmp_path / "itpn.pth")).config.num_heads == 4


def test_parts_that_the_model_has_no_place_for_are_not_dropped_in_silence(tmp_path):
    save_model(tmp_path, pretrain().state_dict(), {"kind": "backbone", "backbone": config().identity()})
    with pytest.raises(DataInvalid, match=r"no place for(.|\n)*cls_pt_layers"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.pth", [torch.zeros(2)], "holds no state dict(.|\\n)*list"),
        ("tensor.pth", torch.zeros(2), "holds no state dict(.|\\n)*Tensor"),
        ("empty.pth", b"", "cannot be read as weights(.|\\n)*EOFError|Ran out of input"),
        ("text.safetensors", b"", "cannot be read as weights"),
        ("config.pth", {"model": {"a": torch.zeros(1)}, "itpn_config": "{"}, "itpn_config cannot be read"),
        ("head.pth", lambda: published().state_dict() | {"lm_head.weight": torch.zeros(3, 384)}, "align_dim"),
        ("cls.pth", lambda: published().state_dict() | {"pos_embed": torch.zeros(1, 37, 384)}, "class token"),
        ("cut.pth", lambda: {n: v for n, v in published().state_dict().items() if "w1" not in n}, "mlp.w1"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-12:] else "",
)
def test_files_that_hold_something_else_are_named(tmp_path, name, content, words):
    content = content() if callable(content) else content
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(DataInvalid, match=words):
        load(str(tmp_path / name))


def test_an_archive_without_its_pickle_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(DataInvalid, match=r"without its data\.pkl"):
        load(str(tmp_path / "a.pt"))


def test_the_config_of_another_program_is_not_taken_for_ours(tmp_path):
    torch.save({"model": published().state_dict()}, tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert load(str(tmp_path / "a.pth")).num_classes == 5


def test_a_position_table_with_a_class_token_is_not_resized():
    state = published().state_dict() | {"pos_embed": torch.zeros(1, 37, 384)}
    with pytest.raises(DataInvalid, match="pos_embed is not that of a square grid"):
        load_backbone_into(published(), state)


def test_pins_are_compared_in_lower_case_and_must_be_pins(tmp_path):
    torch.save({"model": published().state_dict()}, tmp_path / "a.pth")
    digest = sha256_file(tmp_path / "a.pth")
    assert load(str(tmp_path / "a.pth"), sha256=digest.upper()).num_classes == 5
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        load(str(tmp_path / "a.pth"), sha256="abc")
    assert TeacherConfig(uri="a", sha256=digest.upper()).sha256 == digest
    with pytest.raises(ConfigError, match="is no sha256"):
        TeacherConfig.parse({"uri": "a", "sha256": digest[:-1]})


def test_published_pretraining_checkpoint_loads_by_its_flat_names(tmp_path):
    model = pretrain("itpn", mlp_ratio=4.0)
    torch.save({"model": model.published_state_dict()}, tmp_path / "itpn.pth")
    again = load(str(tmp_path / "itpn.pth"))
    image, mask, target = (
        torch.randn(2, 3, 64, 64),
        torch.zeros(2, 16, dtype=torch.bool),
        torch.randn(2, 16, 24),
    )
    assert torch.equal(again(image, mask, target)["loss"], model.eval()(image, mask, target)["loss"])


def test_asking_for_averaged_weights_that_are_not_there_is_an_error(tmp_path):
    state = Classifier(config(), 5).state_dict()
    torch.save({"model": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    for name in ("a.pth", "a.safetensors", "a.pt"):
        with pytest.raises(DataInvalid, match="averaged"):
            load(str(tmp_path / name), ema=True)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_would_run_code_are_refused(tmp_path, capsys):
    torch.save({"model": {"head.weight": torch.zeros(1)}, "extra": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(DataInvalid, match="cannot be read as weights"):
            load(str(tmp_path / name))
    assert "executed" not in capsys.readouterr().out


def test_missing_broken_or_other_files_are_named(tmp_path):
    with pytest.raises(DataInvalid, match="no weights file"):
        load(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(DataInvalid, match="cannot be read"):
        load(str(tmp_path))
    with pytest.raises(DataInvalid, match="not the file that was pinned"):
        load(str(tmp_path), sha256="0" * 64)


def test_unknown_size_and_field_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'fast_itpn_base'"):
        backbone_config("fast_itpn_bse")
    with pytest.raises(ConfigError, match="did you mean 'num_heads'"):
        backbone_config("fast_itpn_base", num_head=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_sizes_that_do_not_fit_name_those_that_would(family):
    with pytest.raises(ConfigError, match="208 or 224"):
        backbone_config("fast_itpn_tiny", img_size=220)
    with pytest.raises(ConfigError, match="48 or 64"):
        build_backbone(config(family))(torch.zeros(1, 3, 64, 50))


def test_same_weights_under_both_name_styles_load_into_a_pretraining_model():
    model, other = pretrain("itpn"), pretrain("itpn")
    report = load_into(other, model.published_state_dict(), allow_missing=())
    assert not (report.missing or report.unexpected or report.dropped)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_models_and_teachers_are_read_over_any_protocol(tmp_path):
    memory = fsspec.filesystem("memory")
    model = Classifier(config(), 5)
    save_model(tmp_path, model.state_dict(), model.describe())
    memory.put(str(tmp_path) + "/", "memory://models/m/", recursive=True)
    again = load("memory://models/m", sha256=sha256_file(tmp_path / "model.safetensors"))
    assert torch.equal(again.head.weight, model.head.weight) and again.config.num_heads == 1
    state = {name[6:]: value for name, value in load_file(CLIP).items() if name.startswith("state.")}
    save_file(state, tmp_path / "clip.safetensors")
    memory.put(str(tmp_path / "clip.safetensors"), "memory://models/clip.safetensors")
    assert load_teacher(TeacherConfig(uri="memory://models/clip.safetensors", heads=4)).dim == 24
    memory.rm("memory://models", recursive=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    """A folder as a web server that takes no notice of queries, and its address."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_web_addresses_with_a_query_name_files(web):
    folder, address = web
    torch.save({"model": published().state_dict()}, folder / "file.pth")
    assert load(f"{address}/file.pth?download=1").num_classes == 5
    uri = f"{address}/file.pth?token=a/b"
    assert weights_file(uri) == uri and examine(uri).sha256 == sha256_file(folder / "file.pth")
    model = Classifier(config(), 3)
    save_model(folder / "m", model.state_dict(), model.describe())  # its heads stand in config.json beside it
    assert torch.equal(load(f"{address}/m/model.safetensors?download=true").head.weight, model.head.weight)
    state = {name[6:]: value for name, value in load_file(CLIP).items() if name.startswith("state.")}
    save_file(state, folder / "open_clip_model.safetensors")
    teacher = TeacherConfig(uri=f"{address}/open_clip_model.safetensors?v=2", heads=4)
    assert find_files(teacher).layout == "open_clip" and load_teacher(teacher).dim == 24


@pytest.mark.parametrize("make", [published, pretrain], ids=["classifier", "pretrain"])
@torch.no_grad()
def test_accelerations_can_be_switched_on_for_trained_weights(tmp_path, make):
    model = make().eval()
    for name, parameter in model.named_parameters():  # strong layer scale, so that attention matters
        if "gamma" in name:
            torch.nn.init.ones_(parameter)
    save_model(tmp_path, model.state_dict(), model.describe())
    image = torch.randn(1, 3, 64, 64)
    plain = model.forward_features(image)
    config = {"migration": MigrationConfig(after_block=1, keep=0.5)} if make is pretrain else {}
    moved = load(str(tmp_path), **config, gathering=GatheringConfig(window=2, tokens=3))
    features = moved.forward_features(image)
    assert ("migrated" in features) == bool(config)
    assert not torch.allclose(features["tokens"], plain["tokens"], atol=1e-4)
    assert torch.equal(features["level8"], plain["level8"])
    assert not next(p for n, p in moved.named_parameters() if n.endswith("gather_embed")).any()
    assert [name[-12:] for name in moved.load_report.missing] == ["gather_embed"]
    neutral = load(str(tmp_path), gathering=GatheringConfig(window=4, tokens=0))
    assert torch.equal(neutral.forward_features(image)["tokens"], plain["tokens"])
    with pytest.raises(ConfigError, match="larger than the 4×4 grid"):
        load(str(tmp_path), gathering=GatheringConfig(window=5))


@torch.no_grad()
def test_accelerations_can_be_switched_off_and_the_input_be_another(tmp_path):
    both = {"migration": MigrationConfig(after_block=1), "gathering": GatheringConfig(window=2, tokens=3)}
    model = pretrain(**both).eval()
    save_model(tmp_path, model.state_dict(), model.describe())
    plain = load(str(tmp_path), img_size=96, migration="off", gathering="off")
    assert (plain.config.migration, plain.config.gathering, plain.config.img_size) == (None, None, 96)
    expected = pretrain().eval()
    state = {name: value for name, value in model.state_dict().items() if "gather_embed" not in name}
    expected.load_state_dict(state)
    image = torch.randn(1, 3, 96, 96)
    found = plain.forward_features(image)
    for name, value in expected.forward_features(image).items():
        torch.testing.assert_close(found[name], value)


def test_weights_without_their_own_gathering_tokens_are_refused(tmp_path):
    model = Classifier(config(gathering=GatheringConfig(window=2, tokens=3)), 5)
    state = {name: value for name, value in model.state_dict().items() if name != "gather_embed"}
    save_model(tmp_path, state, model.describe())
    with pytest.raises(DataInvalid, match="missing: gather_embed"):
        load(str(tmp_path))
