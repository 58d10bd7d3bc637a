"""Pretrain, fine-tune and evaluate on small real images, in this process, with the bundled teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.artifacts import CheckpointRef, DatasetRef, Outcome
from stages.context import StageContext
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.stage import run as evaluate
from stages.finetune.config import FinetuneConfig
from stages.finetune.stage import run as finetune
from stages.model import load, load_teacher
from stages.model.flops import pretrain_flops, teacher_flops
from stages.pretrain.config import PretrainConfig
from stages.pretrain.stage import run as pretrain
from tests.stages.images import shard_folder

TEACHER = Path(__file__).parents[3] / "assets" / "clip-micro"
BACKBONE = {"img_size": 96, "embed_dim": 32, "depths": (1, 1, 2), "num_heads": 2, "drop_path": 0.2}
DATA = {"view": {"size": 96, "min_scale": 0.5}, "streams": 2}


def pretrain_config(**changes) -> PretrainConfig:
    return PretrainConfig.parse(
        {
            "backbone": BACKBONE, "objective": {"fpn_dim": 16}, "teacher": {"uri": str(TEACHER)}, "data": DATA,
            "global_batch": 6, "schedule": {"steps": 4, "warmup_steps": 1}, "optimiser": {"lr": 1e-3},
            "watch": {"picture_every_steps": 2, "tensorboard": True}, "engine": {"peak_tflops": 0.5}, **changes,
        }
    )  # fmt: skip


def finetune_config(**changes) -> FinetuneConfig:
    return FinetuneConfig.parse(
        {
            "backbone": BACKBONE, "data": DATA, "global_batch": 8, "ema_decay": 0.5,
            "schedule": {"steps": 4, "warmup_steps": 1}, "optimiser": {"lr": 1e-3, "layer_decay": 0.8}, **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tiny_dataset: DatasetRef, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("pretrain")
    return out, pretrain(pretrain_config(), {"data": tiny_dataset}, StageContext(out=str(out), attempt="a"))


def test_pretraining_hands_on_weights_metrics_and_lineage(pretrained, tiny_dataset):
    out, outcome = pretrained
    artifact = outcome.artifact
    assert isinstance(artifact, CheckpointRef)
    assert (artifact.task, artifact.step, artifact.dataset) == ("pretrain", 4, tiny_dataset.name)
    assert artifact.teacher_sha256 == storage.sha256_file(TEACHER / "model.safetensors")
    for info in outcome.files:
        assert storage.sha256_file(out / info.path) == info.sha256
    lines = [json.loads(line) for line in (out / "attempts/a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "loss_pyramid", "loss_auxiliary", "lr", "grad_norm", "images_per_s", "data_wait_share",
            "memory_bytes"} <= lines[0].keys()  # fmt: skip
    assert storage.read_json(str(out / "progress.json"))["state"] == "done"


def test_pictures_show_input_mask_prediction_and_target(pretrained):
    paths = sorted((pretrained[0] / "pictures").glob("*.png"))
    assert [path.name for path in paths] == ["000000002-a.png", "000000004-a.png"]
    assert storage.read_json(str(pretrained[0] / "progress.json"))["picture"] == str(paths[-1])
    pixels = np.asarray(Image.open(paths[-1])).astype(int)
    assert pixels.shape == (4 * 96, 6 * 96, 3)
    image, masked, prediction, target = pixels.reshape(4, 96, 6 * 96, 3)
    hidden = (masked == 0).all(-1)
    assert 0.3 < hidden.mean() < 0.5  # 40 % of the tokens are masked
    assert (masked[~hidden] == image[~hidden]).all()
    for colours in (prediction, target):
        tokens = colours.reshape(6, 16, 36, 16, 3)
        assert (tokens == tokens[:, :1, :, :1]).all()  # one colour for each token
    assert target.min() == 0 and target.max() == 255  # the target fills the range of colours
    assert (prediction != target).any()


def test_pictures_leave_no_trace_in_the_run(pretrained, tiny_dataset, tmp_path):
    config = pretrain_config(watch={})
    outcome = pretrain(config, {"data": tiny_dataset}, StageContext(out=str(tmp_path), attempt="a"))
    assert not (tmp_path / "pictures").exists()
    assert outcome.artifact.sha256 == pretrained[1].artifact.sha256


def test_event_files_read_back_give_the_curves_and_the_pictures(pretrained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(pretrained[0] / "tensorboard")).Reload()
    lines = [json.loads(x) for x in (pretrained[0] / "attempts/a/metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "loss_pyramid", "loss_auxiliary", "lr", "grad_norm", "images_per_s", "mfu"):
        events = found.Scalars(f"train/{name}")
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx([line[name] for line in lines])
    assert [event.step for event in found.Images("picture")] == [2, 4]


def test_mfu_is_the_flops_of_student_and_teacher_over_the_peak(pretrained):
    lines = [json.loads(x) for x in (pretrained[0] / "attempts/a/metrics.jsonl").read_text().splitlines()]
    config = pretrain_config()
    teacher = load_teacher(config.teacher)
    flops = 3 * pretrain_flops(config.backbone, config.objective, teacher.dim) + teacher_flops(teacher)
    for line in lines:
        assert line["mfu"] == pytest.approx(line["images_per_s"] * flops / 0.5e12)


def test_finetuning_starts_from_the_pretrained_weights_and_can_be_evaluated(
    pretrained, tiny_dataset, tmp_path
):
    init = pretrained[1].artifact
    context = StageContext(out=str(tmp_path / "finetune"), attempt="a")
    outcome = finetune(finetune_config(rand_augment=9), {"data": tiny_dataset, "init": init}, context)
    artifact = outcome.artifact
    assert (artifact.init, artifact.pretrain, artifact.task) == ("pretrained", init.uri, "classify")
    averaged = load(artifact.uri).state_dict()
    assert load(artifact.uri).classes == ("class_0", "class_1", "class_2"), "the export names its classes"
    last = load(str(tmp_path / "finetune/attempts/a/raw/model.safetensors")).state_dict()
    start = load(init.uri).backbone_state_dict()
    stem = "patch_embed.proj.weight"
    assert 0 < (averaged[stem] - start[stem]).abs().max() < (last[stem] - start[stem]).abs().max() < 0.01
    measured = evaluate(
        EvaluateConfig.parse({"data": {"view": {"size": 96}}}),
        {"data": tiny_dataset, "checkpoint": artifact},
        StageContext(out=str(tmp_path / "evaluate")),
    )
    assert set(measured.metrics) >= {"top1", "top5", "loss", "ece"} and measured.artifact.samples == 12


def test_linear_probe_leaves_the_backbone_as_it_was(pretrained, tiny_dataset, tmp_path):
    init = pretrained[1].artifact
    inputs = {"data": tiny_dataset, "init": init}
    config = finetune_config(train="head", ema_decay=0, schedule={"steps": 2})
    outcome = finetune(config, inputs, StageContext(out=str(tmp_path)))
    found, start = load(outcome.artifact.uri).state_dict(), load(init.uri).backbone_state_dict()
    assert all(torch.equal(found[name], value) for name, value in start.items())


def test_teacher_whose_grid_does_not_fit_is_refused_before_the_first_step(tiny_dataset, tmp_path):
    config = pretrain_config(backbone=BACKBONE | {"img_size": 64}, data={"view": {"size": 64}, "streams": 2})
    with pytest.raises(ConfigError, match="6×6 grid does not fit the student's 4×4 grid"):
        pretrain(config, {"data": tiny_dataset}, StageContext(out=str(tmp_path)))


def test_view_and_backbone_of_different_sizes_are_refused(tiny_dataset, tmp_path):
    with pytest.raises(ConfigError, match="different image sizes"):
        finetune(
            finetune_config(data={"view": {"size": 64}, "streams": 2}),
            {"data": tiny_dataset},
            StageContext(out=str(tmp_path)),
        )


def test_shard_that_is_gone_in_mid_run_is_named(image_folder, tmp_path):
    data = shard_folder(image_folder, tmp_path / "shards", shard_samples=8)
    [victim] = (tmp_path / "shards").rglob("*train-000002*.tar")
    victim.unlink()
    with pytest.raises(DataInvalid, match=r"train-000002\.tar"):
        pretrain(pretrain_config(), {"data": data}, StageContext(out=str(tmp_path / "out")))


def test_missing_input_is_named(tmp_path):
    with pytest.raises(ConfigError, match="needs the input 'data'"):
        pretrain(pretrain_config(), {}, StageContext(out=str(tmp_path)))


def test_backbone_may_be_named():
    named = PretrainConfig.parse(
        {"teacher": {"uri": "x"}, "backbone": {"size": "fast_itpn_tiny", "drop_path": 0.3}}
    )
    assert named.backbone.embed_dim == 384 and named.backbone.drop_path == 0.3
