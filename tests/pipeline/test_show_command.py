"""`itpn show` as a user meets it."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from stages.model import BackboneConfig, MaskedFeatureModel, ObjectiveConfig, save_model

run = CliRunner().invoke


@pytest.fixture
def model(tmp_path):
    config = BackboneConfig(img_size=64, embed_dim=64, depths=(1, 1, 3), num_heads=1)
    made = MaskedFeatureModel(config, ObjectiveConfig(fpn_dim=32), 24)
    save_model(tmp_path / "m", made.state_dict(), made.describe())
    return str(tmp_path / "m")


@pytest.fixture
def picture(tmp_path):
    Image.effect_mandelbrot((90, 70), (-3, -2.5, 2, 2.5), 100).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_it_draws_a_row_for_each_image(tmp_path, model, picture):
    png = tmp_path / "new" / "seen.png"
    done = run(app, ["show", model, picture, picture, "--out", str(png), "--keep", "0.5", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "ok": True, "model": model, "images": [picture, picture], "png": str(png),
    }  # fmt: skip
    with Image.open(png) as sheet:
        # input, mask, three levels, kept tokens
        assert sheet.width > 6 * 192 and sheet.height > 2 * 192


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["{tmp}/none", "{picture}"], 2, "no model at"),
        (["production", "{picture}", "--root", "{tmp}"], 2, "production"),
        (["{model}", "{tmp}/none.png"], 5, "none.png"),
        (["{model}", "{picture}", "--score", "norm"], 2, "give --keep"),
        (["{model}", "{picture}", "--keep", "1.5"], 2, "less than or equal to 1"),
        (["{model}", "{picture}", "--keep", "0.5", "--after-block", "7"], 2, "valid values are 1 to 2"),
        (["{model}", "{picture}", "--teacher", "{tmp}/no-teacher"], 5, "no-teacher"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_told(tmp_path, model, picture, arguments, code, told):
    filled = [part.format(tmp=tmp_path, model=model, picture=picture) for part in arguments]
    done = run(app, ["show", *filled, "--out", str(tmp_path / "x.png")])
    assert (done.exit_code, told in done.stderr) == (code, True), done.output
    assert not (tmp_path / "x.png").exists()
