"""The models equal tensors recorded from the published code: outputs to 1e-5, gradients to 1e-4 relative."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.model import (
    BackboneConfig,
    Classifier,
    MaskedFeatureModel,
    ObjectiveConfig,
    TeacherConfig,
    backbone_config,
    decays,
    load_teacher,
    lr_scale,
    num_layers,
)
from stages.model.fast_itpn import Stem
from stages.model.layers import resize_grid
from stages.model.mfm import published_name

DATA = Path(__file__).parent / "data"
CONFIG = json.loads((DATA / "golden.json").read_text())
KEYS = json.loads((DATA / "published_state_dict_keys.json").read_text())


def load(name):
    return load_file(DATA / f"{name}.safetensors")


def part(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def assert_close(found, expected, tolerance, name):
    scale = expected.abs().max().clamp_min(1e-8)
    error = ((found - expected).abs().max() / scale).item()
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def classify():
    golden = load("fast_itpn_classify")
    c = CONFIG["fast_itpn_classify"]["config"]
    config = BackboneConfig(
        img_size=c["img_size"],
        embed_dim=c["embed_dim"],
        depths=(c["depth_stage1"], c["depth_stage2"], c["depth"]),
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        bridge_mlp_ratio=c["bridge_mlp_ratio"],
        init_values=c["init_values"],
        norm_eps=c["norm_eps"],
    )
    model = Classifier(config, c["num_classes"])
    model.load_state_dict(part(golden, "state."), strict=True)
    return model, golden


def test_fast_itpn_features_match_the_published_code(classify):
    model, golden = classify
    seen = {}
    model.patch_embed.register_forward_hook(lambda *a: seen.update(stem=a[2].permute(0, 3, 1, 2)))
    maps, main = 5, 0
    for index, block in enumerate(model.blocks):
        if index < maps:
            block.register_forward_hook(
                lambda *a, i=index: seen.update({f"block{i}": a[2].permute(0, 3, 1, 2)})
            )
        else:
            block.register_forward_hook(lambda *a, i=main: seen.update({f"main{i}": a[2]}))
            main += 1
    with torch.no_grad():
        model(golden["input"])
    expected = part(golden, "feat.")
    assert set(seen) == set(expected)
    for name, value in expected.items():
        assert_close(seen[name], value, 1e-5, name)


def test_fast_itpn_classifier_matches_logits_loss_and_gradients(classify):
    model, golden = classify
    model.zero_grad()
    pooled = []
    hook = model.fc_norm.register_forward_hook(lambda *a: pooled.append(a[2].detach()))
    logits = model(golden["input"])
    hook.remove()
    assert_close(pooled[0], golden["pooled"], 1e-5, "pooled")
    labels = torch.tensor(CONFIG["fast_itpn_classify"]["labels_for_loss"])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    assert_close(logits.detach(), golden["logits"], 1e-5, "logits")
    assert_close(loss.detach(), golden["loss"], 1e-5, "loss")
    gradients = part(golden, "grad.")
    assert len(gradients) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-4, name)


def test_activation_checkpointing_gives_the_same_gradients(classify):
    model, golden = classify
    other = Classifier(model.config.model_copy(update={"activation_checkpointing": True}), model.num_classes)
    other.load_state_dict(model.state_dict())
    other.train()(golden["input"]).square().sum().backward()
    model.zero_grad()
    model.train()(golden["input"]).square().sum().backward()
    for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_masked_stem_lays_the_token_out_as_unfold_does():
    golden = load("fast_itpn_masked_stem")
    stem = Stem(16, stop_grad=False)
    stem.load_state_dict(part(golden, "state."))
    with torch.no_grad():
        masked = stem(golden["input"], golden["mask"], golden["mask_token"]).permute(0, 3, 1, 2)
        plain = stem(golden["input"]).permute(0, 3, 1, 2)
    assert_close(masked, golden["output"], 1e-5, "masked")
    assert_close(plain, golden["unmasked_output"], 1e-5, "unmasked")


def itpn_pretrain():
    golden = load("itpn_clip_pretrain")
    c = CONFIG["itpn_clip_pretrain"]["config"]
    config = BackboneConfig(
        family="itpn",
        img_size=c["img_size"],
        embed_dim=c["embed_dim"],
        depths=(c["mlp_depth1"], c["mlp_depth2"], c["depth"]),
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        bridge_mlp_ratio=c["bridge_mlp_ratio"],
        init_values=c["init_values"],
        norm_eps=c["norm_eps"],
    )
    objective = ObjectiveConfig(fpn_dim=c["fpn_dim"], fpn_depth=c["fpn_depth"])
    model = MaskedFeatureModel(config, objective, c["teacher_dim"])
    state = part(golden, "state.")
    model.load_state_dict({name: state[published_name(name)] for name in model.state_dict()}, strict=True)
    assert set(model.published_state_dict()) == set(state)
    return model, golden


def test_itpn_pretraining_matches_the_published_code():
    model, golden = itpn_pretrain()
    seen = {}
    model.pyramid.register_forward_hook(lambda *a: seen.update(a[2]))
    model.norm_cls.register_forward_pre_hook(lambda _, args: seen.update(auxiliary_tokens=args[0]))
    model.lm_head.register_forward_hook(lambda *a: seen.update(pyramid_prediction=a[2]))
    model.lm_cls_head.register_forward_hook(lambda *a: seen.update(auxiliary_prediction=a[2]))
    losses = model(golden["input"], golden["mask"], golden["target"])
    losses["loss"].backward()
    for index, (name, k) in enumerate([("level16", 1), ("level8", 2), ("level4", 4)]):
        x = seen[name].detach()
        B, H, W, C = x.shape
        grouped = x.reshape(B, H // k, k, W // k, k, C).permute(0, 1, 3, 2, 4, 5).reshape(B, -1, k, k, C)
        assert_close(grouped, golden[f"level{index}"], 1e-5, name)
    for name in ("auxiliary_tokens", "pyramid_prediction", "auxiliary_prediction"):
        assert_close(seen[name].detach(), golden[name], 1e-5, name)
    for name in ("pyramid", "auxiliary"):
        assert_close(losses[f"loss_{name}"].detach(), golden[f"loss_{name}"], 1e-5, name)
    gradients = part(golden, "grad.")
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[published_name(name)], 1e-4, name)


@pytest.mark.parametrize(
    ("size", "published", "millions"),
    [
        ("fast_itpn_tiny", "fast_itpn_tiny_1112_patch16_224", 24.22),
        ("fast_itpn_small", "fast_itpn_small_2220_patch16_224", 39.90),
        ("fast_itpn_base", "fast_itpn_base_3324_patch16_224", 84.83),
        ("fast_itpn_large", "fast_itpn_large_2240_patch16_256", 312.02),
    ],
)
def test_classifiers_have_every_published_key_shape_and_the_published_count(size, published, millions):
    with torch.device("meta"):
        model = Classifier(backbone_config(size), 1000)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == KEYS[published]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("size", "img_size", "published"),
    [
        ("itpn_base", 224, "clip_tpn_base_3324_patch16_224"),
        ("itpn_large", 224, "clip_tpn_large_2240_patch16_224"),
        ("itpn_large", 256, "clip_tpn_large_2240_patch16_256"),
    ],
)
def test_itpn_pretraining_has_every_published_key_and_shape(size, img_size, published):
    expected = KEYS[published]
    with torch.device("meta"):
        config = backbone_config(size, img_size=img_size, init_values=0.1)
        model = MaskedFeatureModel(config, ObjectiveConfig(), expected["lm_head.weight"][0])
    found = {name: list(value.shape) for name, value in model.published_state_dict().items()}
    assert found == expected


def test_position_embeddings_resize_as_published():
    golden = load("pos_embed_resize")
    assert_close(resize_grid(golden["pos_embed_14"], (40, 40)), golden["pos_embed_40"], 1e-5, "pos_embed")


@pytest.mark.parametrize("name", ["fast_itpn_tiny_1112_patch16_224", "fast_itpn_large_2240_patch16_256"])
def test_layer_decay_matches_the_published_groups(name):
    golden = json.loads((DATA / "layer_decay.json").read_text())[name]
    depths = (1, 1, 12) if "tiny" in name else (2, 2, 40)
    assert num_layers(depths) == golden["num_layers"]
    for parameter, expected in golden["params"].items():
        ndim = len(KEYS[name][parameter])
        scale = lr_scale(parameter, depths, golden["layer_decay"])
        assert scale == pytest.approx(expected["lr_scale"], rel=1e-9)
        assert decays(parameter, ndim) == expected["weight_decay"], parameter


def teacher(tmp_path, **config):
    golden = load("clip_teacher")
    save_file(part(golden, "state."), tmp_path / "clip.safetensors")
    heads = CONFIG["clip_teacher"]["config"]["heads"]
    return load_teacher(TeacherConfig(uri=str(tmp_path / "clip.safetensors"), heads=heads, **config)), golden


def test_clip_teacher_gives_the_recorded_targets(tmp_path):
    model, golden = teacher(tmp_path)
    assert (model.input_size, model.grid, model.dim) == (56, 4, 24)
    target = model(golden["image56"])
    assert_close(target, golden["target56"], 1e-5, "target56")
    assert not target.requires_grad
    pixels = (golden["image56"] - model.mean) / model.std
    assert_close(model.tower(pixels)[1], golden["class_embedding56"], 1e-5, "class")


def test_clip_teacher_interpolates_positions_as_published(tmp_path):
    model, golden = teacher(tmp_path, input_size=42)
    assert model.grid == 3
    assert_close(model(golden["image42"]), golden["target42"], 1e-5, "target42")


def test_published_scaling_reproduces_the_squeezed_images(tmp_path):
    model, golden = teacher(tmp_path, published_scaling=True)
    assert_close(model(golden["image56"]), golden["target56_squeezed_input"], 1e-5, "squeezed")
