"""Evaluation: exact on any number of processes, and equal to a straightforward computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from cluster.hashing import sha256_file
from stages.artifacts import CheckpointRef, DatasetRef, Outcome
from stages.context import StageContext
from stages.data.config import EvalDataConfig
from stages.data.dataset import ShardDataset
from stages.data.view import EvalView
from stages.evaluate.classification import rank_of_label
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.stage import run
from stages.model import BackboneConfig, Classifier, save_model
from tests.stages.images import shard_folder, write_image_folder
from tests.stages.train import ranks

pytestmark = pytest.mark.timeout(600)  # several processes; a busy machine starts them slowly

BACKBONE = BackboneConfig(img_size=32, embed_dim=32, depths=(1, 1, 1), num_heads=2)
CONFIG = EvaluateConfig(data=EvalDataConfig(view=EvalView(size=32, crop_pct=1.0), batch_size=4))
CLASSES = 7


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    """7 classes and 35 val images: neither 2 nor 3 processes share them evenly, nor do batches of 4."""
    images = write_image_folder(tmp_path_factory.mktemp("images"), classes=CLASSES, train=1, val=5)
    return shard_folder(images, tmp_path_factory.mktemp("shards"), shard_samples=8)


def checkpoint(folder: Path, dataset: DatasetRef, classes: int = CLASSES) -> CheckpointRef:
    torch.manual_seed(0)
    model = Classifier(BACKBONE, classes, head_init_scale=10.0)
    save_model(folder, model.state_dict(), model.describe())
    path = folder / "model.safetensors"
    return CheckpointRef(
        uri=str(path), sha256=sha256_file(path), bytes=path.stat().st_size, step=1, task="classify",
        dataset=dataset.name, data_fingerprint=dataset.fingerprint, seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, dataset: DatasetRef) -> CheckpointRef:
    return checkpoint(tmp_path_factory.mktemp("classifier"), dataset)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dataset, classifier) -> Outcome:
    context = StageContext(out=str(tmp_path_factory.mktemp("alone")))
    return run(CONFIG, {"data": dataset, "checkpoint": classifier}, context)


def test_figures_equal_a_straightforward_computation(alone, dataset, classifier):
    torch.manual_seed(0)
    model = Classifier(BACKBONE, CLASSES, head_init_scale=10.0).eval()
    stored = ShardDataset.open(dataset.manifest, "val")
    samples = stored.read(np.arange(len(stored)))
    images = torch.stack([CONFIG.data.view.render(s.bytes, np.empty(0)) for s in samples]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    with torch.no_grad():
        logits = model((images / 255 - mean) / std)
    labels = torch.tensor([s.label for s in samples])
    top5 = logits.topk(5).indices
    expected = {
        "top1": 100 * (logits.argmax(1) == labels).float().mean().item(),
        "top5": 100 * (top5 == labels[:, None]).any(1).float().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
    }
    assert alone.metrics == pytest.approx(expected, rel=1e-5)
    assert alone.artifact.samples == 35 and 0 < expected["top1"] < expected["top5"] < 100


@pytest.mark.parametrize("world_size", [2, 3])
def test_counts_are_exact_on_uneven_shares(alone, dataset, classifier, tmp_path, world_size):
    spec = {
        "out": str(tmp_path / "out"), "ranks": world_size, "result": str(tmp_path / "result"),
        "config": CONFIG.model_dump(mode="json"),
        "inputs": {"data": dataset.model_dump(), "checkpoint": classifier.model_dump()},
    }  # fmt: skip
    codes = ranks.run(world_size, spec, tmp_path, script=Path(__file__).with_name("rank.py"))
    assert codes == [0] * world_size, ranks.errors(tmp_path)
    found = Outcome.model_validate_json((tmp_path / "result").read_text()).metrics
    assert found["top1"] == alone.metrics["top1"] and found["top5"] == alone.metrics["top5"]
    assert found["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)


def test_classifier_of_other_classes_is_refused(dataset, tmp_path):
    wrong = checkpoint(tmp_path, dataset, classes=5)
    with pytest.raises(ConfigError, match="different classes") as error:
        run(CONFIG, {"data": dataset, "checkpoint": wrong}, StageContext(out=str(tmp_path / "out")))
    assert "found:    5" in str(error.value)


def test_pretrained_checkpoint_must_be_fine_tuned_first(dataset, classifier, tmp_path):
    backbone = classifier.model_copy(update={"task": "pretrain"})
    with pytest.raises(ConfigError, match="needs the input 'checkpoint'"):
        run(CONFIG, {"data": dataset, "checkpoint": backbone}, StageContext(out=str(tmp_path)))


def test_ties_and_broken_logits_never_count_as_hits_by_luck():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [float("nan"), 0.0, 0.0], [0.0, 0.0, 3.0]])
    assert rank_of_label(logits, torch.tensor([0, 1, 0, 2])).tolist() == [0, 1, 3, 0]
