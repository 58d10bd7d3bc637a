"""What a fine-tuning step sees is decided by its global batch alone, however that is shared out and cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from stages.artifacts import DatasetRef
from stages.data import augment
from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.view import TrainView
from stages.finetune.config import FinetuneConfig
from stages.finetune.task import ClassifyTask
from tests.stages.images import shard_folder, write_image_folder

BATCH, STREAMS, STEPS = 16, 4, 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    images = write_image_folder(tmp_path_factory.mktemp("images"), classes=4, train=8, val=1)
    return shard_folder(images, tmp_path_factory.mktemp("shards"), shard_samples=8)


def config(**values: object) -> FinetuneConfig:
    """Everything that changes an image is on."""
    return FinetuneConfig.from_values(
        {
            "backbone": {"img_size": 32, "embed_dim": 32, "depths": [1, 1, 1], "num_heads": 2},
            "data": {"view": {"size": 32, "min_scale": 0.3}, "streams": STREAMS},
            "global_batch": BATCH, "rand_augment": 9, "random_erasing": 0.5, "label_smoothing": 0.1, **values,
        },
        {},
    )  # fmt: skip


def seen(dataset: DatasetRef, world_size: int, micro_batch: int) -> dict[tuple[int, int], tuple]:
    """(step, sample id) → the input image and the target, over all ranks."""
    stored = ShardDataset.open(dataset.manifest, "train")
    order = Order(stored.shard_samples, seed=3, streams=STREAMS, global_batch=BATCH, window=2)
    task = ClassifyTask(config(engine={"micro_batch": micro_batch}), torch.nn.Identity(), 4, "cpu")
    found = {}
    for rank in range(world_size):
        feed = TrainFeed(
            stored, order, TrainView(size=32, min_scale=0.3), seed=3, rank=rank, world_size=world_size,
            max_steps=STEPS,
        )  # fmt: skip
        with feed:
            for batch in feed:
                for piece in batch.split(len(batch) // micro_batch):
                    parts = (piece.sample_ids.tolist(), *task._inputs(piece))
                    for sample_id, image, target in zip(*parts, strict=True):
                        found[batch.step, sample_id] = image, target
    assert len(found) == STEPS * BATCH
    return found


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 8), (2, 4), (2, 2), (4, 4), (4, 2)]
)
def test_mixed_inputs_depend_on_neither_ranks_nor_micro_batch(dataset, world_size, micro_batch) -> None:
    whole, parts = seen(dataset, 1, BATCH), seen(dataset, world_size, micro_batch)
    assert whole.keys() == parts.keys()
    for key, (image, target) in whole.items():
        assert torch.equal(image, parts[key][0]), key
        assert torch.equal(target, parts[key][1]), key
    classes = torch.stack([target for _, target in whole.values()])
    assert ((classes > 0.1).sum(1) == 2).float().mean() > 0.3, "labels are mixed"


def test_partner_is_the_neighbour_and_an_odd_batch_has_none() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    target, draws = torch.eye(4), augment.draws(67, augment.Purpose.MIX, 0, 0, np.arange(4))
    mixed = augment.mix_batch(x, target, draws, mixup_alpha=1.0)[1]
    assert [row.nonzero().flatten().tolist() for row in mixed] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    with pytest.raises(ConfigError, match="cannot pair the 3 images"):
        augment.mix_batch(x[:3], target[:3], draws[:3], mixup_alpha=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": {"micro_batch": 1}}, "even, so 2 "),
        ({"engine": {"micro_batch": 3}}, "even, so 2 or 4 "),
        ({"global_batch": 12}, "multiple of 2 x data.streams = 8, so 8 or 16 "),
        ({"global_batch": 4}, "multiple of 2 x data.streams = 8, so 8 "),
    ],
)
def test_batches_that_would_part_pairs_are_refused_with_those_that_fit(values, message) -> None:
    with pytest.raises(ConfigError) as told:
        config(**values)
    assert message in told.value.message
    assert config(**values, mix={"mixup": 0, "cutmix": 0})
