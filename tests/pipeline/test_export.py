"""Checkpoints as files for other programs."""

from __future__ import annotations

import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cluster import storage
from pipeline.cli import app
from pipeline.registry import Registry, ResultRow
from pipeline.registry.lineage import find
from pipeline.runner import Runner
from pipeline.step import Step
from stages.artifacts import CheckpointRef, FileInfo, Outcome
from stages.context import StageContext
from stages.model import BackboneConfig, Classifier, accelerated, load, save_model
from tests.pipeline import toys


def itpn(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"code": done.exit_code}


def make_classifier(config: toys.ToyConfig, inputs: dict[str, Any], context: StageContext) -> Outcome:
    """A real classifier of 64 pixels and 3 classes, saved as training saves one."""
    torch.manual_seed(config.seed)
    model = Classifier(BackboneConfig(img_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=1), 3)
    folder = Path(storage.join(context.files))
    save_model(folder, model.state_dict(), model.describe())
    files = [
        FileInfo(
            path=f"attempts/{context.attempt}/{p.name}",
            bytes=p.stat().st_size,
            sha256=storage.sha256_file(p),
        )
        for p in sorted(folder.iterdir())
    ]
    weights = next(f for f in files if f.path.endswith("model.safetensors"))
    reference = CheckpointRef(
        uri=f"{context.out}/{weights.path}", sha256=weights.sha256, bytes=weights.bytes, step=1, task="classify",
        dataset="toy", data_fingerprint="d" * 64, seed=config.seed,
    )  # fmt: skip
    return Outcome(artifact=reference, files=files)


@pytest.fixture
def root(tmp_path: Path) -> str:
    step = Step(kind="finetune", name="m", fn=make_classifier, config=toys.ToyConfig())
    Runner(str(tmp_path / "root"), "toy", [step], open_session=toys.ThreadSession).run()
    return str(tmp_path / "root")


def test_stored_files_are_copied_verified_with_their_lineage(root: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = itpn("checkpoints", "export", "finetune/m/v1", "--out", str(out), "--root", root)
    assert [f["name"] for f in found["files"]] == ["config.json", "model.safetensors", "lineage.json"]
    assert found["files"][1]["sha256"] == find(Registry(root), "finetune/m/v1").checkpoint.sha256
    assert json.loads((out / "lineage.json").read_text())["step"] == "finetune/m/v1"
    again = itpn("checkpoints", "export", "finetune/m/v1", "--out", str(out), "--root", root)
    assert again["code"] == 2 and "not empty" in again["error"]


def test_published_layout_comes_back_as_the_same_model(root: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = itpn(
        "checkpoints", "export", "finetune/m/v1", "--out", str(out), "--format", "published", "--root", root
    )
    assert [f["name"] for f in found["files"]] == ["published.pth", "lineage.json"]
    image = torch.randn(1, 3, 64, 64)
    original = load(find(Registry(root), "finetune/m/v1").checkpoint.uri)
    with torch.no_grad():
        assert torch.equal(load(str(out / "published.pth"))(image), original(image))


def test_an_export_may_be_accelerated(root: str, tmp_path: Path) -> None:
    def export(name: str, *more: str) -> dict:
        arguments = ["finetune/m/v1", "--out", str(tmp_path / name), "--root", root, *more]
        return itpn("checkpoints", "export", *arguments)

    found = export(
        "both", "--format", "itpn", "--format", "published", "--acceleration", "both", "--keep", "0.25"
    )
    assert found["code"] == 0, found
    image, weights = torch.randn(1, 3, 64, 64), find(Registry(root), "finetune/m/v1").checkpoint.uri
    for name in ("model.safetensors", "published.pth"):
        model = load(str(tmp_path / "both" / name))
        assert model.config.migration.keep == 0.25 and model.config.gathering.window == 4
        assert model.forward_features(image)["migrated"].sum() == 12
    again = load(weights).state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in again.items())
    assert export("off", "--acceleration", "off")["code"] == 0
    assert load(str(tmp_path / "off")).config == load(weights).config
    assert "keep is the share that migration keeps" in export("no", "--keep", "0.5")["error"]
    assert "less than or equal to 1" in export("no", "--acceleration", "both", "--keep", "2")["error"]
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="the extra onnx is not installed")
def test_an_accelerated_onnx_file_of_another_size_agrees_with_torch(root: str, tmp_path: Path) -> None:
    import onnxruntime

    arguments = ["--format", "onnx", "--img-size", "96", "--acceleration", "both", "--root", root]
    found = itpn("checkpoints", "export", "finetune/m/v1", "--out", str(tmp_path / "out"), *arguments)
    assert found["code"] == 0, found
    assert all(f["deviation"] < 1e-3 for f in found["files"] if f["name"].endswith(".onnx"))
    checkpoint = find(Registry(root), "finetune/m/v1").checkpoint.uri
    both = accelerated(load(checkpoint).config, 96)
    model = load(checkpoint, img_size=96, migration=both.migration, gathering=both.gathering)
    image = torch.randn(2, 3, 96, 96)
    session = onnxruntime.InferenceSession(tmp_path / "out/classifier.onnx")
    with torch.no_grad():
        expected = model(image)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), expected, rtol=1e-3, atol=1e-5
    )


def test_damaged_weights_are_not_exported_and_nothing_is_left(root: str, tmp_path: Path) -> None:
    uri = find(Registry(root), "finetune/m/v1").checkpoint.uri
    storage.overwrite(uri, b"x" * storage.size(uri))
    for format_ in ("itpn", "published"):
        out = tmp_path / format_
        found = itpn(
            "checkpoints", "export", "finetune/m/v1", "--out", str(out), "--format", format_, "--root", root
        )
        assert found["code"] == 5 and "sha256" in found["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="the extra onnx is not installed")
def test_onnx_files_tell_their_outputs_and_deviation(root: str, tmp_path: Path) -> None:
    arguments = ["--format", "onnx", "--format", "itpn", "--img-size", "96", "--root", root]
    found = itpn("checkpoints", "export", "finetune/m/v1", "--out", str(tmp_path / "out"), *arguments)
    assert found["code"] == 0, found
    files = {f["name"]: f for f in found["files"]}
    assert files["classifier.onnx"]["outputs"] == ["logits"] and files["classifier.onnx"]["deviation"] < 1e-3
    assert "model.safetensors" in files and (tmp_path / "out/features.onnx").stat().st_size > 0


@pytest.fixture
def evaluated(tmp_path: Path) -> str:
    Runner(str(tmp_path / "root"), "toy", toys.chain(), open_session=toys.ThreadSession).run()
    return str(tmp_path / "root")


def more_results(root: str) -> None:
    """A third evaluation, made after the first export."""
    step = toys.chain()[0].inputs["checkpoint"]
    late = Step(
        kind="evaluate", name="late", fn=toys.evaluate, config=toys.ToyConfig(seed=1), inputs={"checkpoint": step}
    )  # fmt: skip
    Runner(root, "toy", [late], open_session=toys.ThreadSession).run()


def scalars(folder: Path) -> dict[str, list[tuple[str, int, float]]]:
    """What TensorBoard itself reads: (tag, step, value) of every run."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    reader = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    found: dict[str, list[tuple[str, int, float]]] = {}
    for run, tags in reader.Runs().items():
        for tag in tags["tensors"]:
            values = reader.Tensors(run, tag)
            found.setdefault(run, []).extend(
                (tag, v.step, float(v.tensor_proto.float_val[0])) for v in values
            )
        for tag in tags["scalars"]:
            found.setdefault(run, []).extend((tag, v.step, v.value) for v in reader.Scalars(run, tag))
    return {run: sorted(values) for run, values in found.items()}


def test_tensorboard_reads_each_result_once_however_often_it_is_exported(
    evaluated: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    arguments = ["results", "export", "--tensorboard", str(tmp_path / "tb"), "--root", evaluated]
    assert [itpn(*arguments)["new"]["tensorboard"] for _ in range(2)] == [2, 0]
    expected = {
        "evaluate/a/v1": [("toy/val/loss", 1, -3.0), ("toy/val/top1", 1, 3.0)],
        "evaluate/b/v1": [("toy/val/loss", 1, -1.0), ("toy/val/top1", 1, 1.0)],
    }
    assert scalars(tmp_path / "tb") == expected
    more_results(evaluated)
    assert itpn(*arguments)["new"]["tensorboard"] == 1
    found = scalars(tmp_path / "tb")
    assert found["evaluate/late/v1"] == expected["evaluate/a/v1"] and len(found) == 3


@pytest.mark.slow
def test_two_exports_to_mlflow_at_once_make_each_run_once_with_all_of_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    from pipeline.registry import exports

    registry, uri, many = Registry(str(tmp_path / "root")), f"sqlite:///{tmp_path}/mlflow.db", 1234
    facts: dict[str, Any] = {
        "run": "many", "code_version": "c", "created_at": "2026-01-01T00:00:00", "dataset": "d", "split": "val",
        "samples": 1, "init": "scratch", "seed": 0, "evaluator": {}, "checkpoint": "c", "pretrain": None,
        "training_fingerprint": None, "data_fingerprint": "f", "evaluated_fingerprint": "e",
    }  # fmt: skip
    counts = {"evaluate/a/v1": many, "evaluate/b/v1": 1, "evaluate/c/v1": 1}
    rows = [
        ResultRow(**facts, step=step, checkpoint_sha256=step, metric=f"class_{number}", value=number)
        for step, count in counts.items()
        for number in range(count)
    ]
    search = tracking.MlflowClient.search_runs

    def slow(*arguments: Any, **options: Any) -> Any:
        found = search(*arguments, **options)
        time.sleep(0.3)  # both have looked before either makes the run
        return found

    monkeypatch.setattr(tracking.MlflowClient, "search_runs", slow)
    tracking.MlflowClient(uri).search_experiments()  # makes the tables
    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(lambda _: exports.to_mlflow(registry, rows, uri), range(2)))
    assert sorted(new) == [0, len(rows)]
    client = tracking.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("many").experiment_id])
    assert {run.info.run_name: len(run.data.metrics) for run in runs} == counts and len(runs) == 3


@pytest.mark.slow
def test_mlflow_has_each_result_once_also_after_an_export_that_was_cut(
    evaluated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["results", "export", "--mlflow", uri, "--root", evaluated]
    with monkeypatch.context() as patch:

        def dies(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(tracking.MlflowClient, "log_batch", dies)
        assert CliRunner().invoke(app, arguments).exit_code == 130
    assert [itpn(*arguments)["new"]["mlflow"] for _ in range(2)] == [4, 0]
    more_results(evaluated)
    assert itpn(*arguments)["new"]["mlflow"] == 2
    client = tracking.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    found = {run.info.run_name: run for run in runs}
    assert len(runs) == 3 and all(run.info.status == "FINISHED" for run in runs)
    first = found["evaluate/a/v1"]
    assert first.data.metrics == {"toy/val/top1": 3.0, "toy/val/loss": -3.0}
    assert len(client.get_metric_history(first.info.run_id, "toy/val/top1")) == 1
    assert first.data.params["train.value"] == "3.0" and first.data.tags["itpn.init"] == "pretrained"
    assert first.data.tags["itpn.evaluated_fingerprint"] == "e" * 64
    refused = itpn("results", "export", "--mlflow", "nonsense://x", "--root", evaluated)
    assert refused["code"] == 2 and "sqlite:///FILE" in refused["error"]
