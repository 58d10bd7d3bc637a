"""The same weights under a corrected config.json are measured anew; under the same one nothing is added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.resources import Resources
from pipeline.recipes._chain import adopt_step, evaluate_step, shard_step
from pipeline.registry import Registry
from stages.adopt.config import AdoptConfig
from stages.adopt.outside import config_sha256
from stages.artifacts import DatasetRef
from stages.context import StageContext
from stages.evaluate.config import EvaluateConfig
from stages.shard.config import ShardConfig
from tests.pipeline.toys import finished
from tests.stages.evaluate import models
from tests.stages.images import shard_folder, write_image_folder

KINDS = ({"kind": "classification"}, {"kind": "knn", "k": 3})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    images = write_image_folder(tmp_path_factory.mktemp("images"), classes=3, train=3, val=3)
    return shard_folder(images, tmp_path_factory.mktemp("shards"))


def evaluated(root: Path, given: Path, name: str, data: DatasetRef, config: EvaluateConfig) -> int:
    """Take the checkpoint in, evaluate it, publish it; returns how many rows that added."""
    uri, one = str(given / "model.safetensors"), Resources()
    weights = models.reference(given, data, "classify").sha256
    source = AdoptConfig(uri=uri, sha256=weights, config_sha256=config_sha256(uri))
    taken = adopt_step(name, source, "v1", one)
    judged = evaluate_step(
        name, config, shard_step(ShardConfig(name="x", source=""), "v1", one), taken, "v1", one
    )
    checkpoint = taken.fn(source, {}, StageContext(out=taken.output(str(root)), attempt="a")).artifact
    context = StageContext(out=judged.output(str(root)), attempt="a")
    found = judged.fn(judged.config, {"data": data, "checkpoint": checkpoint}, context)
    before = len(Registry(str(root)).results())
    Registry(str(root)).publish([finished(judged, found.artifact)])
    return len(Registry(str(root)).results()) - before


@pytest.mark.parametrize(
    ("field", "value", "new"),
    [("num_heads", 4, True), ("norm_eps", 1e-3, True), ("drop_path", 0.3, False)],
)
def test_only_what_decides_the_figures_makes_new_rows(
    dataset: DatasetRef, tmp_path: Path, field: str, value: float, new: bool
) -> None:
    given, config = tmp_path / "given", models.config(*KINDS)
    models.save_classifier(given, dataset, 3)
    every = evaluated(tmp_path / "root", given, "a", dataset, config)
    assert every > 5
    assert evaluated(tmp_path / "root", given, "b", dataset, config) == 0
    beside = given / "config.json"
    description = json.loads(beside.read_text())
    assert description["backbone"][field] != value
    description["backbone"][field] = value
    beside.write_text(json.dumps(description))
    assert evaluated(tmp_path / "root", given, "c", dataset, config) == (every if new else 0)
