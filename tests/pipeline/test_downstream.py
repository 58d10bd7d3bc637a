"""`itpn finetune` and `itpn evaluate`: from a published file to rows, and from a name in the registry."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cluster import storage
from pipeline.cli import app
from stages.model import (
    BackboneConfig,
    Classifier,
    MaskedFeatureModel,
    ObjectiveConfig,
    backbone_config,
    save_model,
)
from tests.stages.images import write_image_folder

REPOSITORY = Path(__file__).resolve().parents[2]
# A published width: the heads of others cannot be read off a file without config.
SMALL = BackboneConfig(img_size=64, embed_dim=384, depths=(1, 1, 2), num_heads=6)
CPU = ["gpus_per_worker=0", "finetune_workers=1", "shard_workers=1"]


def settings(*items: str) -> list[str]:
    return [part for item in items for part in ("--set", item)]


def published(path: Path, config: BackboneConfig, classes: int = 0) -> str:
    model = (
        Classifier(config, classes)
        if classes
        else MaskedFeatureModel(config, ObjectiveConfig(fpn_dim=32), 24)
    )
    state = model.state_dict() if classes else model.published_state_dict()
    torch.save({"model": state}, path)
    return str(path)


def planned(*arguments: str) -> list[dict]:
    done = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])["steps"]


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2, done.output
    return done.stderr


def test_recipe_follows_the_size_of_a_published_checkpoint(tmp_path: Path) -> None:
    uri = published(tmp_path / "tiny.pth", backbone_config("fast_itpn_tiny"), classes=10)
    short = storage.sha256_file(uri)[:8]
    ids = [
        step["step"]
        for step in planned("finetune", uri, "--root", str(tmp_path / "r"), "--data", "x/ILSVRC2012")
    ]
    assert [i for i in ids if i.startswith("finetune")] == [
        f"finetune/downstream-tiny-{short}-{size}px-s0/v1" for size in (224, 384, 512)
    ]
    assert f"import/tiny-{short}/v1" in ids and "shard/imagenet-1k/v1" in ids


def test_gpus_may_be_shared_by_jobs(tmp_path: Path) -> None:
    uri = published(tmp_path / "small.pth", SMALL)
    flags = settings("gpus_per_worker=0.25", "finetune_workers=1", "cpus_per_worker=2")
    steps = planned("finetune", uri, "--root", str(tmp_path / "r"), "--data", "x/pets.tar", *flags)
    tuned = [step for step in steps if step["step"].startswith("finetune")]
    assert {step["resources"] for step in tuned} == {"1 x (2 CPU + 0.25 GPU)"}
    assert any(step["step"] == "shard/pets/v1" for step in steps)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    uri = published(tmp_path / "pre.pth", SMALL)
    root = str(tmp_path / "root")
    assert "no checkpoint was given" in refused("finetune", "", "--root", root)
    assert "no root was given" in refused("finetune", uri, "--root", "")
    told = refused("finetune", str(tmp_path / "absent.pth"), "--root", root)
    assert "neither a weights file nor a checkpoint" in told and "alias" in told
    cpu = settings(*CPU)
    told = refused("finetune", uri, "--root", root, *cpu)
    assert "data set: not given" in told and "IMAGENET=URI or DATA=URI" in told
    assert "8 GPUs are needed" in refused("finetune", uri, "--root", root, "--data", str(tmp_path))
    shared = settings("gpus_per_worker=0.5", "finetune_workers=2")
    assert "cannot share a GPU" in refused("finetune", uri, "--root", root, "--data", str(tmp_path), *shared)


def test_recipe_without_a_pinned_checkpoint_says_how_to_pin_it(tmp_path: Path) -> None:
    uri = published(tmp_path / "pre.pth", SMALL)
    flags = settings(f"checkpoints.base.uri={uri}", f"data.source={tmp_path}", "gpus_per_worker=0")
    told = refused("run", "downstream_base", "--root", str(tmp_path / "root"), *flags)
    assert "it is what its bytes are" in told and "checkpoints.base.sha256=" in told
    model = Classifier(SMALL, 2)
    save_model(tmp_path / "ours", model.state_dict(), model.describe())
    uri = str(tmp_path / "ours" / "model.safetensors")
    flags[1] = f"checkpoints.base.uri={uri}"
    flags += settings(
        f"checkpoints.base.sha256={storage.sha256_file(uri)}", "checkpoints.base.classes=names.txt"
    )
    told = refused("run", "downstream_base", "--root", str(tmp_path / "root"), *flags)
    assert "names.txt is not pinned" in told and "checkpoints.base.classes_sha256=" in told
    flags += settings("checkpoints.base.classes=")
    told = refused("run", "downstream_base", "--root", str(tmp_path / "root"), *flags)
    digest = storage.sha256_file(tmp_path / "ours" / "config.json")
    assert f"--set checkpoints.base.config_sha256={digest}" in told


def test_class_names_of_a_published_head_are_part_of_what_it_is(tmp_path: Path) -> None:
    uri = published(tmp_path / "small.pth", SMALL, classes=3)
    short, root = storage.sha256_file(uri)[:8], str(tmp_path / "r")
    file = tmp_path / "wnids.txt"
    file.write_text("n01\nn02\nn03\n")
    names = storage.sha256_file(file)[:8]
    for command in ("finetune", "evaluate"):
        given = (command, uri, "--root", root, "--data", "x/pets.tar")
        ids = [step["step"] for step in planned(*given, "--classes", str(file))]
        assert f"import/model-{short}-classes-{names}/v1" in ids
        assert not {i for i in ids if not i.startswith("shard")} & {step["step"] for step in planned(*given)}
    file.write_text("n01\nn02\n")
    told = refused("finetune", uri, "--root", root, "--data", "x/pets.tar", "--classes", str(file))
    assert "3 different names" in told
    backbone = published(tmp_path / "pre.pth", SMALL)
    assert "no classes to name" in refused("finetune", backbone, "--root", root, "--classes", str(file))


def test_each_reading_of_one_file_is_a_step_of_its_own(tmp_path: Path) -> None:
    """Averaged weights or not, one config.json or another: none stands in the way of the other."""
    state = Classifier(SMALL, 3).state_dict()
    torch.save({"model": state, "model_ema": state}, tmp_path / "both.pth")
    given = ("evaluate", str(tmp_path / "both.pth"), "--root", str(tmp_path / "r"), "--data", "x/pets.tar")

    def ids(*arguments: str) -> set[str]:
        return {step["step"] for step in planned(*arguments) if not step["step"].startswith("shard")}

    assert not ids(*given) & ids(*given, "--ema")
    model = Classifier(SMALL, 3)
    save_model(tmp_path / "ours", model.state_dict(), model.describe())
    given = ("evaluate", str(tmp_path / "ours"), *given[2:])
    before, beside = ids(*given), tmp_path / "ours" / "config.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"classes": ["n01", "n02", "n03"]}))
    assert not before & ids(*given)


def test_a_checkpoint_may_be_evaluated_in_more_ways_than_one(tmp_path: Path) -> None:
    """Other evaluators, other data, another view or precision: each is a step of its own, none is drift."""
    uri, root = published(tmp_path / "small.pth", SMALL, classes=3), str(tmp_path / "r")

    def ids(data: str, *items: str) -> list[str]:
        steps = planned("evaluate", uri, "--root", root, "--data", data, *settings(*items))
        return [step["step"] for step in steps if step["step"].startswith("evaluate")]

    [plain] = ids("x/pets.tar")
    assert plain == f"evaluate/pets-model-{storage.sha256_file(uri)[:8]}-64px/v1"
    ways = [
        ids("x/flowers.tar"),
        *(
            ids("x/pets.tar", f"evaluate.{item}")
            for item in (
                'evaluators=[{"kind": "knn"}]',
                'evaluators=[{"kind": "knn", "k": 5}]',
                'evaluators=[{"kind": "classification"}, {"kind": "classification", "acceleration": "both"}]',
                "data.view.size=256",
                "data.view.crop_pct=1.0",
                "precision=bf16",
                "classes=names.txt",
            )
        ),
    ]
    assert len({plain, *(step for way in ways for step in way)}) == 1 + len(ways)
    assert ids("x/pets.tar", "evaluate.data.batch_size=8") == [plain], "how fast is no other evaluation"
    other, way = "also.imagenet_v2=/data/v2", 'evaluate.evaluators=[{"kind": "knn"}]'
    assert ids("x/pets.tar", other)[1] == ids("x/pets.tar", other, way)[1], "further sets are asked one thing"


def test_what_is_measured_follows_the_checkpoint_and_the_data(tmp_path: Path) -> None:
    head, backbone = published(tmp_path / "a.pth", SMALL, classes=3), published(tmp_path / "b.pth", SMALL)

    def kinds(uri: str, *items: str) -> str:
        flags = ("--root", str(tmp_path / "r"), "--data", "x/pets.tar", *settings(*items))
        [step] = [s["step"] for s in planned("evaluate", uri, *flags) if s["step"].startswith("evaluate")]
        return step.split("/")[1].partition("px")[2]

    assert kinds(head) == "" and kinds(backbone) == "-knn-linear-speed"
    only = 'data.splits=["val"]'
    assert kinds(head, only) == "-classification-speed" and kinds(backbone, only) == "-speed"


def test_heads_that_do_not_fit_further_sets_are_refused_before_anything_runs(tmp_path: Path) -> None:
    head, backbone = published(tmp_path / "a.pth", SMALL, classes=3), published(tmp_path / "b.pth", SMALL)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "file").write_text("x")
    (tmp_path / "names.txt").write_text("n01\nn02\nn03\n")

    def told(uri: str, *sets: str, more: tuple[str, ...] = ()) -> str:
        items = settings(*(f"also.imagenet_{name}={tmp_path / 'images'}" for name in sets))
        # The GPUs that are asked for are the one thing that is always missing.
        items += settings("gpus_per_worker=1000")
        return refused("evaluate", uri, "--root", str(tmp_path / "r"), "--data", str(tmp_path), *items, *more)

    assert "the classes of imagenet-a, imagenet-r among those of the head" in (
        found := told(head, "a", "r", "v2")
    )
    assert "`--classes FILE` of itpn evaluate" in found
    assert "head of" not in told(head, "sketch", "v2"), "as many classes in one order"
    assert "head of" not in told(head, "a", more=("--classes", str(tmp_path / "names.txt")))
    assert "head of" not in told(head, "a", more=("--set", f"evaluate.classes={tmp_path / 'names.txt'}"))
    found = told(backbone, "sketch", "v2")
    assert "cannot be evaluated on imagenet-v2, imagenet-sketch" in found
    assert "--set also.imagenet_v2= --set also.imagenet_sketch=" in found
    assert "head of" not in told(backbone)


@pytest.mark.parametrize("target", ["finetune", "evaluate"])
def test_make_hands_on_what_the_command_takes(target: str) -> None:
    def command(*values: str) -> list[str]:
        given = ["make", "-n", target, "CHECKPOINT=a.pth", "ROOT=r", *values]
        done = subprocess.run(given, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        [line] = [line for line in done.stdout.replace("\\\n", "").splitlines() if f"itpn {target}" in line]
        return shlex.split(line)[2:]

    plain = ["a.pth", "--root", "r", "--data", ""]
    assert command() == plain
    more = command("CLASSES=my names.txt", "EMA=1", "SET=a.b=1 c=[2]")
    assert more == [*plain, "--classes", "my names.txt", "--ema", "--set", "a.b=1", "--set", "c=[2]"]


def itpn(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments, "--json"],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_from_a_published_file_to_rows_and_again_by_name(tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images")
    uri = published(tmp_path / "pre.pth", SMALL)
    root = str(tmp_path / "root")
    flags = settings(
        *CPU, "grid.resolution=[64,96]", "finetune.schedule.epochs=null", "finetune.schedule.steps=2",
        "finetune.global_batch=8", "finetune.data.streams=2", "finetune.engine.micro_batch=null",
        "finetune.engine.precision=fp32", "finetune.engine.compile=false", "finetune.data.loader_workers=0",
        "finetune.checkpoint.save_every_steps=2", "finetune.schedule.warmup_steps=1",
        "evaluate.data.loader_workers=0", "probe.data.loader_workers=0",
        'evaluate.evaluators=[{"kind":"classification"},{"kind":"speed","batch_sizes":[1],"iterations":2}]',
    )  # fmt: skip
    first = itpn("finetune", uri, "--root", root, "--data", str(images), *flags)
    tuned = [s["step"] for s in first["steps"] if s["step"].startswith("finetune")]
    metrics = {r["metric"] for r in first["results"]}
    assert len(tuned) == 2 and metrics >= {"top1", "loss", "ece", "knn_top1", "linear_top1", "images_per_s"}
    record = storage.read_json(storage.join(root, tuned[1], "record.json"))
    assert record["notes"][0] == "resized to 96 px: backbone.pos_embed"
    assert record["artifact"]["init"] == "pretrained"
    moved = Path(uri).rename(tmp_path / "moved.pth")
    again = itpn("finetune", str(moved), "--root", root, "--data", str(images), *flags)
    assert all(step["reused"] for step in again["steps"]), (
        "the same bytes in another place are the same checkpoint"
    )

    judged = itpn("evaluate", tuned[0], "--root", root, *settings("gpus_per_worker=0"))
    assert [s["reused"] for s in judged["steps"] if s["step"].startswith("shard")] == [True]
    speed = {"images_per_s", "latency_p50_ms", "latency_p99_ms", "peak_memory_bytes", "flops"}
    assert {row["metric"] for row in judged["results"]} >= {
        "top1", "top5", "loss", "ece", "knn_top1", "linear_top1", *speed,
    }  # fmt: skip

    probed = itpn(
        "evaluate", str(moved), "--root", root, "--data", str(images), *settings("gpus_per_worker=0")
    )
    assert {row["metric"] for row in probed["results"]} == {"knn_top1", "linear_top1", *speed}, (
        "a backbone has features to judge"
    )
