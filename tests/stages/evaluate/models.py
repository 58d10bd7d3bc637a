"""A small data set, checkpoints of it, and the straightforward way to their logits and features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cluster.hashing import sha256_file
from stages.artifacts import CheckpointRef, DatasetRef
from stages.data.config import EvalDataConfig
from stages.data.dataset import ShardDataset
from stages.data.view import EvalView
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.setting import IMAGENET
from stages.model import (
    BackboneConfig,
    Classifier,
    MaskedFeatureModel,
    Normalisation,
    ObjectiveConfig,
    save_model,
)

BACKBONE = BackboneConfig(img_size=32, embed_dim=32, depths=(1, 1, 3), num_heads=2)
DATA = EvalDataConfig(view=EvalView(size=32, crop_pct=1.0), batch_size=4)


def config(*evaluators: dict, **values: object) -> EvaluateConfig:
    """An evaluation at 32 pixels."""
    return EvaluateConfig.parse({"data": DATA.model_dump(), "evaluators": evaluators, **values})


def reference(folder: Path, dataset: DatasetRef, task: str) -> CheckpointRef:
    """The weights in `folder` as a stage hands them on."""
    path = folder / "model.safetensors"
    return CheckpointRef(
        uri=str(path), sha256=sha256_file(path), bytes=path.stat().st_size, step=1, task=task,
        dataset=dataset.name, data_fingerprint=dataset.fingerprint, seed=0,
    )  # fmt: skip


def classifier(classes: int, backbone: BackboneConfig = BACKBONE) -> torch.nn.Module:
    """The same weights at every call; they tell images apart."""
    torch.manual_seed(0)
    return Classifier(backbone, classes, head_init_scale=10.0).eval()


def save_classifier(
    folder: Path, dataset: DatasetRef, classes: int, names: list[str] | None = None
) -> CheckpointRef:
    """A classifier of so many classes, with their names beside it where they are given."""
    model = classifier(classes)
    about = model.describe() | ({"classes": names} if names else {})
    save_model(folder, model.state_dict(), about)
    return reference(folder, dataset, "classify")


def save_pretrained(folder: Path, dataset: DatasetRef) -> CheckpointRef:
    """A checkpoint of pre-training: no head of classes."""
    torch.manual_seed(0)
    model = MaskedFeatureModel(BACKBONE, ObjectiveConfig(fpn_dim=16), 24)
    save_model(folder, model.state_dict(), model.describe())
    return reference(folder, dataset, "pretrain")


@torch.no_grad()
def images_and_labels(
    dataset: DatasetRef, split: str, size: int = 32, normalisation: Normalisation = IMAGENET
) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, normalised, in one batch, and their labels."""
    stored = ShardDataset.open(dataset.manifest, split)
    samples = list(stored.read(np.arange(len(stored))))
    view = EvalView(size=size, crop_pct=1.0)
    pixels = torch.stack([view.render(s.bytes, np.empty(0)) for s in samples]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in normalisation)
    return (pixels / 255 - mean) / std, torch.tensor([s.label for s in samples])
