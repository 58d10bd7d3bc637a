"""Stages as plain programs: what they leave, and how each wrong input ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]


def stage(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"stages.{name}", *arguments],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ImageFolder of two classes, eight images each in train and two in val."""
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("cats", "dogs")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.jpg").write_bytes(jpeg(100 * label + number))
    return tmp_path / "images"


def shard(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return stage("shard", "--out", str(out), "--set", "name=tiny", "--set", f"source={folder}", *more)


def pretrain(shards: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "backbone": "fast_itpn_micro", "data.view.size": 96, "data.streams": 2, "objective.fpn_dim": 32,
        "teacher.uri": REPOSITORY / "assets" / "clip-micro", "global_batch": 4, "schedule": '{"steps": 2}',
    }  # fmt: skip
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return stage("pretrain", "--out", str(out), "--input", f"data={shards}", *flags, *more)


def test_stages_hand_over_through_artifact_files(folder: Path, tmp_path: Path) -> None:
    done = shard(folder, tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["splits"] == {"train": 16, "val": 4}
    done = pretrain(tmp_path / "shards", tmp_path / "pretrain")
    assert done.returncode == 0, done.stderr
    checkpoint = json.loads(done.stdout.splitlines()[-1])
    assert Path(checkpoint["uri"]).exists() and checkpoint["step"] == 2


def test_teacher_whose_grid_does_not_fit_is_code_2_and_names_what_would(folder: Path, tmp_path: Path) -> None:
    assert shard(folder, tmp_path / "shards").returncode == 0
    done = pretrain(tmp_path / "shards", tmp_path / "pretrain", "--set", "teacher.input_size=112")
    assert done.returncode == 2, done.stderr
    assert "7" in done.stderr and "96" in done.stderr and "Traceback" not in done.stderr


def test_class_folder_without_an_image_is_code_5_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "birds").mkdir()
    done = shard(folder, tmp_path / "out")
    assert done.returncode == 5
    assert "birds" in done.stderr and "remedy" in done.stderr


def test_broken_image_is_code_5_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "cats" / "3.jpg").write_bytes(b"not an image")
    done = shard(folder, tmp_path / "out")
    assert done.returncode == 5
    assert "cats/3.jpg" in done.stderr and "max_bad_fraction" in done.stderr


def test_broken_image_within_the_limit_is_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "cats" / "3.jpg").write_bytes(b"not an image")
    done = shard(folder, tmp_path / "out", "--set", "max_bad_fraction=0.1")
    assert done.returncode == 0, done.stderr
    reference = json.loads(done.stdout.splitlines()[-1])
    assert reference["splits"]["train"] == 15
    assert "cats/3.jpg" in json.loads(Path(reference["manifest"]).read_text())["skipped"][0]["source"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--set", "name=x", "--set", "source=/no/such"], 5, "/no/such"),
        (["--set", "name=x"], 2, "source: Field required"),
        (["--set", "nam=x"], 2, "did you mean 'name'"),
        (["--config", "/no/such.json"], 2, "/no/such.json"),
    ],
    ids=["missing source", "no source", "unknown key", "missing config"],
)
def test_wrong_input_is_told(tmp_path: Path, arguments: list[str], code: int, told: str) -> None:
    done = stage("shard", "--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == code, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr


def test_input_that_is_no_finished_output_is_named(tmp_path: Path) -> None:
    done = pretrain(tmp_path / "nothing", tmp_path / "out")
    assert done.returncode == 5
    assert "input 'data' is not a finished output" in done.stderr


def test_several_ranks_without_torchrun_name_the_command(folder: Path, tmp_path: Path) -> None:
    assert shard(folder, tmp_path / "shards").returncode == 0
    done = pretrain(tmp_path / "shards", tmp_path / "pretrain", "--workers", "2")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
