"""Opens a data set for training: its sample order, and feeds from any cursor."""

from __future__ import annotations

from cluster.distributed import World
from stages.data.config import DataConfig
from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.train.config import LoopConfig
from stages.train.task import MakeFeed


def open_training_data(
    loop: LoopConfig, data: DataConfig, manifest: str, *, split: str, world: World
) -> tuple[ShardDataset, Order, MakeFeed]:
    """The split, its order under the run's seed and global batch, and what `Trainer` opens feeds with."""
    dataset = ShardDataset.open(manifest, split, data.cache)
    order = Order(
        dataset.shard_samples,
        seed=loop.seed,
        streams=data.streams,
        global_batch=loop.global_batch,
        window=data.window,
    )

    def make_feed(start: tuple[int, int], end: int) -> TrainFeed:
        return TrainFeed(
            dataset,
            order,
            data.view,
            seed=loop.seed,
            rank=world.rank,
            world_size=world.world_size,
            start=start,
            max_steps=end,
            loader_workers=data.loader_workers,
            max_bad_fraction=data.max_bad_fraction,
        )

    return dataset, order, make_feed
