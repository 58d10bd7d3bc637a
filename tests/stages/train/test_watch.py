"""What rank 0 tells about a run: curves without doubles after a resume, progress, gauges, MFU."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import storage
from cluster.distributed import World
from cluster.errors import ConfigError, StorageUnavailable
from stages.train import watch as room
from stages.train.config import EngineConfig, LoopConfig
from stages.train.metrics import Smoothed, Speed, require_tensorboard
from stages.train.mfu import known_peak_tflops, peak_flops
from stages.train.watch import Watch

CPU = World(rank=0, world_size=4, local_rank=0, device="cpu")


def watch(out: Path, attempt: str, start: int = 0, events: list[dict[str, Any]] | None = None) -> Watch:
    config = LoopConfig.parse({"schedule": {"steps": 8}, "watch": {"tensorboard": True}})
    return Watch(
        config, out=str(out), attempt=attempt, start=start, total=8, steps_per_epoch=4, device="cpu",
        speed=Speed(batch=10, flops_per_image=2e9, peak=1e12), events=events or [],
    )  # fmt: skip


def store(out: Path, files: dict[str, Path]) -> None:
    """What a checkpoint does with the files of a cut."""
    for name, local in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(local, out / name)


def test_curves_of_a_resumed_run_hold_each_step_once(tmp_path: Path) -> None:
    first = watch(tmp_path, "first")
    for step in (1, 2, 3, 4):
        first.step(step, {"loss": step}, (0.1, 0.0), applied=True, lr=0.1)
    store(tmp_path, first.cut("000000004-first"))
    for step in (5, 6):  # uploaded, but killed before the manifest of step 6
        first.step(step, {"loss": 100.0}, (0.1, 0.0), applied=True, lr=0.1)
    store(tmp_path, first.cut("000000006-first"))
    first.close()
    second = watch(tmp_path, "second", start=4)
    for step in (5, 6, 7, 8):
        second.step(step, {"loss": step}, (0.1, 0.0), applied=True, lr=0.1)
        if step % 2 == 0:
            store(tmp_path, second.cut(f"{step:09d}-second"))
    second.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4
    curve = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in curve] == [(step, step) for step in range(1, 9)]


def test_progress_holds_losses_speed_mfu_events_and_where_things_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauges: list[tuple[dict, dict]] = []
    monkeypatch.setattr(room, "publish_gauges", lambda values, tags: gauges.append((values, tags)))
    out = tmp_path / "pretrain" / "toy" / "v1"
    told = watch(out, "b", start=4, events=[{"event": "rolled back", "step": 3, "to": 2}])
    told.event("step not applied", 5, reason="loss not finite on 1 rank(s)", loss=float("nan"))
    told.step(5, {"loss": 0.5, "loss_head": 0.25}, (0.5, 0.1), applied=False, lr=0.1)
    told.picture(5, np.zeros((4, 6, 3), np.uint8))
    told.step(6, {"loss": 0.5, "loss_head": 0.25}, (1.5, 0.4), applied=True, lr=0.1)
    told.close()
    progress = storage.read_json(str(out / "progress.json"))
    assert (progress["done"], progress["total"], progress["unit"]) == (6, 8, "steps")
    metrics = progress["metrics"]
    # 2 steps of 10 images in 2 s, of which 0.5 s were spent waiting; 2 GFLOP an image, 1 TFLOP/s.
    assert metrics == pytest.approx(
        {
            "images_per_s": 10,
            "mfu": 0.02,
            "data_wait_share": 0.25,
            "epoch": 1.5,
            "loss": 0.5,
            "loss_head": 0.25,
        }
    )
    assert [event["step"] for event in progress["events"]] == [3, 5] and progress["events"][1][
        "loss"
    ] == "nan"
    assert (
        progress["picture"] == str(out / "pictures" / "000000005-b.png")
        and Path(progress["picture"]).exists()
    )
    assert progress["tensorboard"] == str(out / "tensorboard")
    values, tags = gauges[-1]
    assert tags == {"run": "pretrain/toy/v1"} and values["train_step"] == 6
    assert values["train_mfu"] == pytest.approx(0.02) and values["train_loss_head"] == 0.25


def test_missing_tensorboard_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"itpn-pipeline\[tensorboard\]"):
        require_tensorboard()


def test_picture_that_cannot_be_stored_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(uri: str, data: bytes) -> None:
        raise StorageUnavailable("the store is away")

    monkeypatch.setattr(storage, "overwrite", refuse)
    told = watch(tmp_path, "a")
    with caplog.at_level(logging.WARNING):
        told.picture(1, np.zeros((4, 6, 3), np.uint8))
        told.step(1, {"loss": 0.5}, (0.5, 0.1), applied=True)
        told.close()
    assert "the store is away" in caplog.text
    assert storage.read_json(str(tmp_path / "progress.json"))["done"] == 1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100 80GB PCIe", 312.0), ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.5), ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0), ("NVIDIA A10", 125.0), ("NVIDIA A10G", None), ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Tesla V100-SXM2-16GB", None),
    ],
)  # fmt: skip
def test_peak_of_well_known_devices_is_known_and_of_others_not_guessed(
    name: str, tflops: float | None
) -> None:
    assert known_peak_tflops(name) == tflops


def test_config_gives_the_peak_where_the_device_is_unknown() -> None:
    assert peak_flops(EngineConfig(), CPU) is None
    assert peak_flops(EngineConfig(peak_tflops=0.5), CPU) == 4 * 0.5e12
    unknown = Speed(batch=10, flops_per_image=2e9, peak=None)
    assert unknown.lap(1.0, 0.0) == {"images_per_s": 10.0, "data_wait_share": 0.0}


def test_running_mean_leaves_out_what_is_not_finite() -> None:
    smoothed = Smoothed()
    for loss in (1.0, float("nan"), 3.0):
        smoothed.add({"loss": loss, "head": loss / 2})
    expected = (0.98 * 1.0 + 3.0) / (0.98 + 1)
    assert smoothed.means() == pytest.approx({"loss": expected, "head": expected / 2})
    assert Smoothed(smoothed.weight, smoothed.sums).means() == smoothed.means()
