"""Pictures: one row per image, every panel that applies, clear errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError, DataInvalid
from stages.model import (
    BackboneConfig,
    Classifier,
    MaskedFeatureModel,
    MigrationConfig,
    Normalisation,
    ObjectiveConfig,
    TeacherConfig,
    save_model,
)
from stages.model.show import LABEL, PANEL, show, without_pattern

GOLDEN = Path(__file__).parents[2] / "parity" / "data" / "clip_teacher.safetensors"
CONFIG = BackboneConfig(img_size=64, embed_dim=64, depths=(1, 1, 3), num_heads=1)


@pytest.fixture
def pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 90, 120, 3), dtype=np.uint8)
    for i in range(2):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    return [str(tmp_path / "0.png"), str(tmp_path / "1.png")]


def save(folder, model):
    save_model(folder, model.state_dict(), model.describe())
    return str(folder)


def columns(path, rows):
    with Image.open(path) as sheet:
        assert sheet.height == LABEL + rows * (PANEL + 4)
        return sheet.width // (PANEL + 4), np.asarray(sheet.convert("RGB"))


def test_a_pretrained_model_shows_mask_levels_teacher_prediction_and_migration(tmp_path, pictures):
    uri = save(tmp_path / "m", MaskedFeatureModel(CONFIG, ObjectiveConfig(fpn_dim=32), 24))
    state = {n.removeprefix("state."): v for n, v in load_file(GOLDEN).items() if n.startswith("state.")}
    save_file(state, tmp_path / "clip.safetensors")
    teacher = TeacherConfig(uri=str(tmp_path / "clip.safetensors"), heads=4)
    path = show(uri, pictures, tmp_path / "a.png", teacher=teacher, migration=MigrationConfig(keep=0.25))
    count, pixels = columns(path, rows=2)
    assert count == len(["input", "mask", "1/16", "1/8", "1/4", "teacher", "prediction", "kept tokens"])
    last = pixels[LABEL : LABEL + PANEL, -PANEL - 2 : -2].astype(int)
    tiles = last.reshape(4, PANEL // 4, 4, PANEL // 4, 3).mean((1, 3, 4))
    assert (tiles < 60).sum() == 12  # three quarters of the 16 tokens are dark
    again = show(uri, pictures, tmp_path / "b.png", teacher=teacher, migration=MigrationConfig(keep=0.25))
    assert path.read_bytes() == again.read_bytes()


def test_a_teacher_named_by_its_uri_sees_an_input_that_fits_the_model(tmp_path, pictures):
    config = CONFIG.model_copy(update={"img_size": 96})  # 6×6 tokens; the teacher's own input gives 4×4
    uri = save(tmp_path / "m", Classifier(config, 5))
    state = {n.removeprefix("state."): v for n, v in load_file(GOLDEN).items() if n.startswith("state.")}
    save_file(state, tmp_path / "clip.safetensors")
    path = show(uri, pictures[:1], tmp_path / "a.png", teacher=str(tmp_path / "clip.safetensors"))
    assert columns(path, rows=1)[0] == len(["input", "1/16", "1/8", "1/4", "teacher"])


def test_the_pattern_that_every_patch_repeats_is_taken_off():
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(3, 1, 3, 1, 5, generator=generator).expand(3, 4, 3, 4, 5).reshape(12, 12, 5)
    pattern = 9 * torch.randn(4, 4, 5, generator=generator).repeat(3, 3, 1)
    expected = picture - picture.mean((0, 1))
    torch.testing.assert_close(without_pattern(picture + pattern, 3), expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_shows_input_and_levels(tmp_path, pictures):
    uri = save(tmp_path / "m", Classifier(CONFIG, 5))
    assert columns(show(uri, pictures[:1], tmp_path / "a.png"), rows=1)[0] == 4


def test_inputs_are_normalised_as_the_model_was_trained(tmp_path, pictures):
    model = Classifier(CONFIG, 5)
    plain = show(save(tmp_path / "plain", model), pictures[:1], tmp_path / "a.png").read_bytes()
    model.normalisation = Normalisation((0.0, 0.0, 0.0), (0.1, 1.0, 1.0))
    own = show(save(tmp_path / "own", model), pictures[:1], tmp_path / "b.png").read_bytes()
    assert own != plain
    half = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    given = show(str(tmp_path / "own"), pictures[:1], tmp_path / "c.png", normalisation=half)
    assert given.read_bytes() == plain


def test_pictures_and_teachers_that_do_not_fit_are_named(tmp_path, pictures):
    uri = save(tmp_path / "m", Classifier(CONFIG, 5))
    with pytest.raises(ConfigError, match="no image"):
        show(uri, [], tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataInvalid, match=r"broken\.png is no picture"):
        show(uri, [str(tmp_path / "broken.png")], tmp_path / "a.png")
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="valid values are 1 to 2"):
        show(uri, pictures, tmp_path / "a.png", migration=MigrationConfig(after_block=3))
