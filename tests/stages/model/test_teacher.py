"""Teachers in every layout give the same targets; grids and pins are checked; nothing pickled is run."""

import hashlib
import json
import pickle
import subprocess
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError, DataInvalid, StorageUnavailable
from stages.model import TeacherConfig, backbone_config, check_grids, load_teacher
from stages.model import teacher as room

GOLDEN = Path(__file__).parents[2] / "parity" / "data" / "clip_teacher.safetensors"
ASSET = Path(__file__).parents[3] / "assets" / "clip-micro"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def openai_state(golden):
    return {name.removeprefix("state."): v for name, v in golden.items() if name.startswith("state.")}


def hf_folder(folder, state):
    """The same weights as a Hugging Face CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=56,
        patch_size=14, projection_dim=24, hidden_act="quick_gelu",
    )  # fmt: skip
    v = {name.removeprefix("visual."): value for name, value in state.items()}
    e = "vision_model.embeddings."
    hf = {
        e + "class_embedding": v["class_embedding"],
        e + "position_embedding.weight": v["positional_embedding"],
        e + "patch_embedding.weight": v["conv1.weight"],
        "visual_projection.weight": v["proj"].t(),
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for part in ("weight", "bias"):
        hf[f"vision_model.pre_layrnorm.{part}"] = v[f"ln_pre.{part}"]
        hf[f"vision_model.post_layernorm.{part}"] = v[f"ln_post.{part}"]
        for layer in range(2):
            ours, theirs = f"transformer.resblocks.{layer}.", f"vision_model.encoder.layers.{layer}."
            for a, b in names.items():
                hf[f"{theirs}{b}.{part}"] = v[f"{ours}{a}.{part}"]
            hf[f"{theirs}self_attn.out_proj.{part}"] = v[f"{ours}attn.out_proj.{part}"]
            for letter, piece in zip("qkv", v[f"{ours}attn.in_proj_{part}"].chunk(3), strict=True):
                hf[f"{theirs}self_attn.{letter}_proj.{part}"] = piece
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict({k: v.contiguous() for k, v in hf.items()}, strict=False)
    model.save_pretrained(folder)
    return model


def test_hugging_face_layout_gives_the_recorded_targets(tmp_path, golden, openai_state):
    hf_folder(tmp_path, openai_state)
    teacher = load_teacher(TeacherConfig(uri=str(tmp_path)))
    torch.testing.assert_close(teacher(golden["image56"]), golden["target56"], rtol=1e-4, atol=1e-5)
    assert (teacher.input_size, teacher.grid, teacher.dim) == (56, 4, 24)


def test_open_clip_layout_gives_the_recorded_targets(tmp_path, golden, openai_state):
    save_file(openai_state, tmp_path / "open_clip_model.safetensors")
    vision = {"width": 64, "head_width": 16, "layers": 2, "patch_size": 14, "image_size": 56}
    config = {"model_cfg": {"vision_cfg": vision, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.4] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    teacher = load_teacher(TeacherConfig(uri=str(tmp_path)))
    assert teacher.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    teacher.mean.copy_(torch.tensor(room.CLIP_MEAN).view(1, 3, 1, 1))
    torch.testing.assert_close(teacher(golden["image56"]), golden["target56"], rtol=1e-4, atol=1e-5)


def test_layout_and_weights_are_chosen_together(tmp_path, openai_state):
    hf_folder(tmp_path, openai_state)
    save_file(openai_state, tmp_path / "open_clip_model.safetensors")
    vision = {"width": 64, "head_width": 16, "layers": 2, "patch_size": 14, "image_size": 56}
    described = {"model_cfg": {"vision_cfg": vision, "quick_gelu": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    hf, open_clip = str(tmp_path / "model.safetensors"), str(tmp_path / "open_clip_model.safetensors")
    for layout, weights in (("auto", hf), ("hf", hf), ("open_clip", open_clip)):
        found = room.find_files(TeacherConfig(uri=str(tmp_path), layout=layout))
        assert (found.weights, found.layout) == (weights, "hf" if weights == hf else "open_clip")
    assert load_teacher(TeacherConfig(uri=str(tmp_path), layout="open_clip")).dim == 24
    assert load_teacher(TeacherConfig(uri=open_clip)).dim == 24
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_clip_224"}))  # timm's
    found = room.find_files(TeacherConfig(uri=str(tmp_path)))
    assert (found.weights, found.layout, found.config) == (open_clip, "open_clip", described)


def test_an_activation_that_no_config_names_is_told(tmp_path, openai_state, caplog):
    save_file(openai_state, tmp_path / "clip.safetensors")
    save_file(openai_state, tmp_path / "open_clip_model.safetensors")
    targets = {}
    image = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for name, activation in (("clip", "quick_gelu"), ("open_clip_model", "gelu")):
        uri = str(tmp_path / f"{name}.safetensors")
        targets[name] = load_teacher(TeacherConfig(uri=uri))(image)
        assert f"{uri} has no config beside it: its activation is taken to be {activation};" in caplog.text
        caplog.clear()
        explicit = load_teacher(TeacherConfig(uri=uri, activation=activation))(image)
        assert torch.equal(explicit, targets[name]) and caplog.text == ""
    assert not torch.equal(targets["clip"], targets["open_clip_model"])


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, openai_state):
    save_file(openai_state, tmp_path / "clip.safetensors")
    with pytest.raises(DataInvalid, match=r"width 64 cannot have 7 heads(.|\n)*teacher\.heads"):
        load_teacher(TeacherConfig(uri=str(tmp_path / "clip.safetensors"), heads=7))


class Holder(torch.nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.visual = tower

    def forward(self, x):
        return self.visual(x)[0]


def archive(path, openai_state):
    from stages.model.clip_tower import ClipTower, from_openai

    tower = ClipTower(from_openai(openai_state), heads=4, quick_gelu=True).requires_grad_(False)
    torch.jit.trace(Holder(tower), torch.zeros(1, 3, 56, 56)).save(path)


def test_openai_torchscript_archive_is_read_without_torchscript(tmp_path, golden, openai_state, monkeypatch):
    archive(tmp_path / "ViT.pt", openai_state)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("the archive's code was loaded"))
    teacher = load_teacher(TeacherConfig(uri=str(tmp_path / "ViT.pt"), heads=4))
    torch.testing.assert_close(teacher(golden["image56"]), golden["target56"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_openai_state_dict_file_is_read(tmp_path, golden, openai_state, half):
    state = {name: value.half() if half else value for name, value in openai_state.items()}
    torch.save(state | {"transformer.resblocks.0.ln_1.weight": torch.ones(3)}, tmp_path / "clip.pt")
    teacher = load_teacher(TeacherConfig(uri=str(tmp_path / "clip.pt"), heads=4))
    tolerance = 2e-2 if half else 1e-5
    torch.testing.assert_close(teacher(golden["image56"]), golden["target56"], rtol=1e-4, atol=tolerance)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_an_archive_that_asks_for_anything_but_tensors_is_refused(tmp_path, openai_state, capsys):
    archive(tmp_path / "good.pt", openai_state)
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for name in good.namelist():
            data = pickle.dumps(Evil()) if name.endswith("/data.pkl") else good.read(name)
            evil.writestr(name, data)
    with pytest.raises(DataInvalid, match="not a tensor"):
        load_teacher(TeacherConfig(uri=str(tmp_path / "evil.pt")))
    assert "executed" not in capsys.readouterr().out


def test_an_archive_cannot_alter_what_it_names(tmp_path, openai_state):
    archive(tmp_path / "good.pt", openai_state)
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    altering = b"\x80\x02" + function + b"(N}X\x06\x00\x00\x00tamperK\x01stb."  # GLOBAL, (None, {..}), BUILD
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for name in good.namelist():
            evil.writestr(name, altering if name.endswith("/data.pkl") else good.read(name))
    with pytest.raises(DataInvalid, match="no tensors"):
        load_teacher(TeacherConfig(uri=str(tmp_path / "evil.pt")))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "tamper")


def small(kind):
    import transformers

    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "siglip":
        config = transformers.SiglipVisionConfig(**common, image_size=48, patch_size=16)
        return transformers.SiglipVisionModel(config)
    if kind == "registers":
        config = transformers.Dinov2WithRegistersConfig(
            **common, image_size=42, patch_size=14, num_register_tokens=3
        )
        return transformers.Dinov2WithRegistersModel(config)
    return transformers.Dinov2Model(transformers.Dinov2Config(**common, image_size=42, patch_size=14))


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "registers"])
def test_siglip_and_dinov2_give_their_normalised_patch_tokens(tmp_path, kind):
    torch.manual_seed(0)
    model = small(kind).eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherConfig(uri=str(tmp_path)))
    image = torch.rand(2, 3, teacher.input_size, teacher.input_size)
    with torch.no_grad():
        tokens = model((image - teacher.mean) / teacher.std).last_hidden_state[:, -9:]
    torch.testing.assert_close(teacher(image), torch.nn.functional.layer_norm(tokens, (32,)))
    bigger = load_teacher(TeacherConfig(uri=str(tmp_path), input_size=teacher.patch_size * 4))
    assert bigger(image).shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("width", "layers", "patch", "pixels", "dim", "millions"),
    [
        (768, 12, 16, 224, 512, 86.2),
        (768, 12, 32, 224, 512, 87.8),
        (1024, 24, 14, 224, 768, 304.0),
        (1024, 24, 14, 336, 768, 304.3),
    ],
    ids=["B/16", "B/32", "L/14", "L/14-336"],
)
def test_released_clip_shapes_build_and_give_their_grid(width, layers, patch, pixels, dim, millions):
    from stages.model.clip_tower import ClipTower

    tokens = (pixels // patch) ** 2
    shapes = {
        "class_embedding": (width,), "positional_embedding": (tokens + 1, width), "proj": (width, dim),
        "conv1.weight": (width, 3, patch, patch),
    } | {f"{name}.{part}": (width,) for name in ("ln_pre", "ln_post") for part in ("weight", "bias")}  # fmt: skip
    block = {
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
    } | {f"{name}.{part}": (width,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}  # fmt: skip
    for layer in range(layers):
        shapes |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tower = ClipTower(state, heads=None, quick_gelu=True)
    assert tower.native_grid == pixels // patch
    assert tower.transformer["resblocks"][0].attn.heads == width // 64
    assert round(sum(p.numel() for p in tower.parameters()) / 1e6, 1) == millions
    assert tower(torch.empty(2, 3, pixels, pixels, device="meta"))[0].shape == (2, tokens, dim)


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_released_siglip_and_dinov2_shapes_run(kind):
    import transformers

    from stages.model.hf_towers import HfTower

    with torch.device("meta"):
        if kind == "siglip":  # base, patch 16, 224 pixels
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig())
        else:  # base, patch 14
            model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14))
        tower = HfTower(model, first_patch=0 if kind == "siglip" else 1, interpolate=kind == "siglip")
        tokens = tower(torch.empty(1, 3, 224, 224))[0]
    assert tokens.shape == (1, 196 if kind == "siglip" else 256, 768)


def test_a_full_siglip_checkpoint_gives_its_vision_tower(tmp_path):
    import transformers

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = text | {"image_size": 48, "patch_size": 16}
    config = transformers.SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=vision)
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    assert load_teacher(TeacherConfig(uri=str(tmp_path)))(torch.rand(1, 3, 48, 48)).shape == (1, 9, 32)


def test_an_unsupported_model_type_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="'resnet' are not supported"):
        load_teacher(TeacherConfig(uri=str(tmp_path)))


def test_weights_are_pinned_by_sha256(tmp_path, openai_state):
    path = tmp_path / "clip.safetensors"
    save_file(openai_state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_teacher(TeacherConfig(uri=str(path), sha256=digest, heads=4)).sha256 == digest
    with pytest.raises(DataInvalid, match="not the file that was pinned"):
        load_teacher(TeacherConfig(uri=str(path), sha256="0" * 64, heads=4))


@pytest.mark.parametrize(
    ("student", "fits"), [(96, "teacher.input_size=84"), (224, "teacher.input_size=196")]
)
def test_grids_that_differ_name_the_sizes_that_would_fit(tmp_path, openai_state, student, fits):
    save_file(openai_state, tmp_path / "clip.safetensors")
    teacher = load_teacher(TeacherConfig(uri=str(tmp_path / "clip.safetensors"), heads=4))
    with pytest.raises(ConfigError, match=fits + ".*student input of 64"):
        check_grids(backbone_config("fast_itpn_micro", img_size=student), teacher)
    check_grids(backbone_config("fast_itpn_micro", img_size=64), teacher, teacher_dim=24)
    with pytest.raises(ConfigError, match="another width"):
        check_grids(backbone_config("fast_itpn_micro", img_size=64), teacher, teacher_dim=512)


def test_an_input_size_that_cuts_patches_is_refused(tmp_path, openai_state):
    save_file(openai_state, tmp_path / "clip.safetensors")
    with pytest.raises(ConfigError, match=r"teacher.input_size=56 or 70"):
        load_teacher(TeacherConfig(uri=str(tmp_path / "clip.safetensors"), heads=4, input_size=60))


def shard(folder, model):
    """A transformers model in several files; their sha256 as the shell tells it."""
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and not (folder / "model.safetensors").exists()
    command = "sha256sum model-*.safetensors | sha256sum"
    told = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    return told.stdout.split()[0]


def test_weights_in_several_files_are_read_and_pinned_together(tmp_path, golden, openai_state):
    digest = shard(tmp_path / "parts", hf_folder(tmp_path / "whole", openai_state))
    index = tmp_path / "parts" / "model.safetensors.index.json"
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "parts") + "/", "memory://sharded/", recursive=True)
    for uri in (str(tmp_path / "parts"), str(index), "memory://sharded"):
        teacher = load_teacher(TeacherConfig(uri=uri, sha256=digest))
        torch.testing.assert_close(teacher(golden["image56"]), golden["target56"], rtol=1e-4, atol=1e-5)
        assert load_teacher(TeacherConfig(uri=uri)).sha256 == digest
    with pytest.raises(DataInvalid, match="not the file that was pinned"):
        load_teacher(TeacherConfig(uri=str(index), sha256="0" * 64))
    memory.rm("memory://sharded", recursive=True)


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_towers_of_transformers_are_read_from_several_files(tmp_path, kind):
    model = small(kind)
    model.save_pretrained(tmp_path / "whole")
    digest = shard(tmp_path / "parts", model)
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    whole, parts = (load_teacher(TeacherConfig(uri=str(tmp_path / name))) for name in ("whole", "parts"))
    image = torch.rand(1, 3, whole.input_size, whole.input_size)
    assert torch.equal(parts(image), whole(image)) and parts.sha256 == digest != whole.sha256


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda first, second, index: second.unlink(), r"model-00002-.* is missing"),
        (
            lambda first, second, index: second.write_bytes(second.read_bytes()[:-9]),
            r"00002-.* cannot be read",
        ),
        (lambda first, second, index: second.write_bytes(first.read_bytes()), r"00002-.* is not the file"),
        (lambda first, second, index: index.write_text("{}"), r"no index of weights(.|\n)*no weight_map"),
        (
            lambda first, second, index: index.write_text('{"weight_map": {"a": "../b.safetensors"}}'),
            r"no index of weights(.|\n)*\.\./b",
        ),
    ],
    ids=["missing", "cut short", "another's", "empty index", "outside"],
)
def test_every_one_of_several_files_is_verified(tmp_path, openai_state, damage, words):
    shard(tmp_path / "parts", hf_folder(tmp_path / "whole", openai_state))
    first, second = sorted((tmp_path / "parts").glob("model-*.safetensors"))[:2]
    damage(first, second, tmp_path / "parts" / "model.safetensors.index.json")
    with pytest.raises(DataInvalid, match=words):
        load_teacher(TeacherConfig(uri=str(tmp_path / "parts")))


def test_only_the_files_that_the_index_names_are_fetched_from_the_hub(tmp_path, openai_state, monkeypatch):
    import huggingface_hub

    shard(tmp_path, hf_folder(tmp_path / "whole", openai_state))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )  # fmt: skip
    assert load_teacher(TeacherConfig(uri="some-org/clip-large")).dim == 24
    parts = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert asked == [["*.json", "model.safetensors", "open_clip_model.safetensors"], ["*.json", *parts]]


def test_missing_and_wrong_files_are_named(tmp_path):
    with pytest.raises(DataInvalid, match="no teacher at"):
        load_teacher(TeacherConfig(uri=str(tmp_path / "nothing")))
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataInvalid, match=r"model\.safetensors: .*no CLIP vision transformer"):
        load_teacher(TeacherConfig(uri=str(tmp_path)))


@pytest.mark.parametrize("damage", ["cut short", "not finite"])
def test_damaged_weights_name_the_file(tmp_path, openai_state, damage):
    path = tmp_path / "clip.safetensors"
    save_file({**openai_state, "visual.proj": openai_state["visual.proj"] * float("nan")}, path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataInvalid, match=r"teacher .*clip\.safetensors: "):
        load_teacher(TeacherConfig(uri=str(path), heads=4))


def test_hub_names_are_fetched_and_failures_say_what_to_do(tmp_path, openai_state, monkeypatch):
    import huggingface_hub

    hf_folder(tmp_path, openai_state)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: str(tmp_path))
    assert load_teacher(TeacherConfig(uri="some-org/clip-tiny")).dim == 24
    assert room.hub_name("hf://some-org/clip") == "some-org/clip"
    assert room.hub_name("hf://some-org/clip/sub/model.safetensors") is None  # a file: read as any URI
    assert room.hub_name("s3://bucket/clip") is None and room.hub_name("weights/clip.pt") is None

    def unreachable(name, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(StorageUnavailable, match=r"no route to host(.|\n)*give its folder as teacher.uri"):
        load_teacher(TeacherConfig(uri="some-org/clip-tiny"))


def test_the_teacher_is_frozen_and_resizes_images_of_another_size(tmp_path, golden, openai_state):
    save_file(openai_state, tmp_path / "clip.safetensors")
    teacher = load_teacher(TeacherConfig(uri=str(tmp_path / "clip.safetensors"), heads=4)).train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert teacher(torch.rand(1, 3, 96, 80)).shape == (1, 16, 24)
    bf16 = load_teacher(TeacherConfig(uri=str(tmp_path / "clip.safetensors"), heads=4, precision="bf16"))
    target = bf16(golden["image56"])
    assert target.dtype == torch.float32
    assert (target - golden["target56"]).abs().mean() < 0.02


@pytest.mark.skipif(not ASSET.exists(), reason="the bundled teacher has not been built")
def test_the_bundled_teacher_fits_the_micro_student_and_equals_transformers():
    from transformers import CLIPVisionModelWithProjection

    teacher = load_teacher(TeacherConfig(uri=str(ASSET)))
    check_grids(backbone_config("fast_itpn_micro"), teacher)
    model = CLIPVisionModelWithProjection.from_pretrained(ASSET).eval()
    image = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        hidden = model.vision_model((image - teacher.mean) / teacher.std).last_hidden_state
        tokens = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1:]))
    expected = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
    torch.testing.assert_close(teacher(image), expected, rtol=1e-3, atol=1e-4)
