"""Feeds: the same batches for any number of loader workers, errors instead of hangs."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cluster.errors import ConfigError, DataInvalid, StepFailed
from stages.artifacts import DatasetRef
from stages.data.batch import Batch
from stages.data.dataset import ShardDataset
from stages.data.feed import EvalFeed, TrainFeed
from stages.data.order import Order
from stages.data.view import EvalView, TrainView
from tests.stages.images import jpeg, picture, shard_folder, write_image_folder

VIEW = TrainView(size=32)


def order_of(dataset: ShardDataset, **values: int) -> Order:
    return Order(dataset.shard_samples, **{"seed": 1, "streams": 2, "global_batch": 8, "window": 2, **values})


@pytest.fixture
def dataset(tiny_dataset: DatasetRef) -> ShardDataset:
    return ShardDataset.open(tiny_dataset.manifest, "train")


def collect(dataset: ShardDataset, **options: object) -> list[Batch]:
    with TrainFeed(dataset, order_of(dataset), VIEW, seed=5, **options) as feed:  # type: ignore[arg-type]
        return list(feed)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        (a.epoch, a.step) == (b.epoch, b.step)
        and torch.equal(a.sample_ids, b.sample_ids)
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        for a, b in zip(left, right, strict=True)
    )


def test_a_feed_yields_the_order_with_labels_and_pixels(dataset: ShardDataset) -> None:
    order, batches = order_of(dataset), collect(dataset, epochs=2)
    assert [(b.epoch, b.step) for b in batches] == [(e, s) for e in range(2) for s in range(3)]
    for batch in batches:
        assert batch.images.shape == (8, 32, 32, 3) and batch.images.dtype == torch.uint8
        assert batch.sample_ids.tolist() == order.batch(batch.epoch, batch.step).tolist()
        assert batch.labels.tolist() == dataset.labels[batch.sample_ids.numpy()].tolist()
        assert batch.replaced == 0


def test_loader_processes_give_the_same_batches_as_the_thread(dataset: ShardDataset) -> None:
    assert same(collect(dataset, epochs=2), collect(dataset, epochs=2, loader_workers=2))


def test_a_feed_resumes_at_any_step(dataset: ShardDataset) -> None:
    assert same(collect(dataset, epochs=3)[4:], collect(dataset, epochs=3, start=(1, 1)))
    assert same(collect(dataset, epochs=3)[2:5], collect(dataset, max_steps=5, start=(0, 2)))


def test_ranks_share_each_batch_without_changing_it(dataset: ShardDataset) -> None:
    whole = collect(dataset, epochs=1)
    parts = [collect(dataset, epochs=1, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        pixels = dict(zip(batch.sample_ids.tolist(), batch.images, strict=True))
        ids = torch.cat([part[step].sample_ids for part in parts])
        assert sorted(ids.tolist()) == sorted(pixels)
        for part in parts:
            for sample_id, image in zip(part[step].sample_ids.tolist(), part[step].images, strict=True):
                assert torch.equal(image, pixels[sample_id])


def test_micro_batches_are_views_of_the_batch(dataset: ShardDataset) -> None:
    [first, *_] = collect(dataset, epochs=1, micro_batches=4)
    parts = list(first.split(4))
    assert torch.equal(torch.cat([part.images for part in parts]), first.images)
    assert parts[1].images.data_ptr() == first.images[2:].data_ptr()
    with pytest.raises(ConfigError, match="micro-batches"):
        TrainFeed(dataset, order_of(dataset), VIEW, seed=5, micro_batches=3)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_sees_every_sample_once(tiny_dataset: DatasetRef, world_size: int) -> None:
    dataset = ShardDataset.open(tiny_dataset.manifest, "val")
    seen: list[int] = []
    for rank in range(world_size):
        with EvalFeed(dataset, EvalView(size=32), rank=rank, world_size=world_size, batch_size=5) as feed:
            for batch in feed:
                seen += batch.sample_ids.tolist()
                assert batch.labels.tolist() == dataset.labels[batch.sample_ids.numpy()].tolist()
    assert seen == list(range(12))


@pytest.fixture
def damaged(tmp_path: Path) -> ShardDataset:
    """36 train images of which two are cut short; their headers are whole, so sharding lets them pass."""
    source = write_image_folder(tmp_path / "in", train=12, height=64, width=96)
    for name in ("class_0/img_3.jpg", "class_2/img_7.jpg"):
        whole = jpeg(picture(1, height=200, width=300))
        (source / "train" / name).write_bytes(whole[: len(whole) // 2])
    ref = shard_folder(source, tmp_path / "out", shard_samples=10)
    shutil.rmtree(source)
    return ShardDataset.open(ref.manifest, "train")


def test_a_sample_that_does_not_decode_is_replaced_and_counted(damaged: ShardDataset) -> None:
    def read(workers: int) -> list[Batch]:
        with TrainFeed(
            damaged,
            order_of(damaged, global_batch=4),
            VIEW,
            seed=5,
            epochs=1,
            loader_workers=workers,
            max_bad_fraction=0.1,
        ) as feed:
            batches = list(feed)
            assert feed.replaced == sum(batch.replaced for batch in batches) == 2
            assert sorted(key for key, _ in feed.bad.values()) == ["class_0/img_3", "class_2/img_7"]
            return batches

    assert same(read(0), read(1))


def test_too_many_bad_samples_stop_with_the_list(damaged: ShardDataset) -> None:
    with (
        pytest.raises(DataInvalid, match=r"class_\d/img_\d \(sample \d+\): jpeg does not decode"),
        TrainFeed(damaged, order_of(damaged, global_batch=4), VIEW, seed=5, epochs=1) as feed,
    ):
        list(feed)


def test_evaluation_does_not_replace(damaged: ShardDataset) -> None:
    with pytest.raises(DataInvalid, match="do not decode"), EvalFeed(damaged, EvalView(size=32)) as feed:
        list(feed)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_an_error_with_its_name(image_folder: Path, tmp_path: Path, workers: int) -> None:
    ref = shard_folder(image_folder, tmp_path, shard_samples=8)
    dataset = ShardDataset.open(ref.manifest, "train")
    Path(dataset.uris[2]).unlink()
    with (
        pytest.raises(DataInvalid, match="train-000002"),
        TrainFeed(dataset, order_of(dataset), VIEW, seed=5, epochs=1, loader_workers=workers) as feed,
    ):
        list(feed)


def test_a_killed_loader_process_is_an_error_not_a_hang(dataset: ShardDataset) -> None:
    with TrainFeed(dataset, order_of(dataset), VIEW, seed=5, loader_workers=2) as feed:
        next(feed)
        children = psutil.Process().children(recursive=True)
        loaders = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
        assert len(loaders) == 2
        os.kill(loaders[0].pid, signal.SIGKILL)
        # Its cause: the signal, in words or as exit code, or the socket of the dead one if that is met first.
        cause = "(by signal: Killed|exit code -9|Connection|EOF)"
        with pytest.raises(StepFailed, match=rf"loader process died\n.*{cause}"):
            for _ in range(1000):
                next(feed)
    assert psutil.wait_procs(loaders, timeout=60)[1] == []


def test_batches_are_pinned_where_there_is_a_gpu(
    dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Batch] = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    collect(dataset, epochs=1)
    assert not pinned
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(collect(dataset, epochs=1)) == len(pinned) == 3
    collect(dataset, epochs=1, pin_memory=False)
    assert len(pinned) == 3


@pytest.mark.slow
def test_closing_a_busy_feed_ends_its_process_without_a_crash(
    dataset: ShardDataset, capfd: pytest.CaptureFixture
) -> None:
    """Every other process used to abort: the interpreter's end met the thread that hands batches over."""
    view, order = TrainView(size=448), order_of(dataset, global_batch=24)
    for _ in range(4):
        with TrainFeed(dataset, order, view, seed=5, loader_workers=1) as feed:
            for _ in range(4):
                next(feed)
    assert "terminate called" not in capfd.readouterr().err


def test_waiting_is_measured_and_closing_ends_an_endless_feed(dataset: ShardDataset) -> None:
    feed = TrainFeed(dataset, order_of(dataset), VIEW, seed=5)
    next(feed)
    assert 0 < feed.wait_s < 30
    feed.close()
    with pytest.raises(StopIteration):
        next(feed)


def test_an_unknown_split_is_named(tiny_dataset: DatasetRef) -> None:
    with pytest.raises(DataInvalid, match="no split 'vall'"):
        ShardDataset.open(tiny_dataset.manifest, "vall")


def test_reading_by_id_gives_the_stored_bytes(dataset: ShardDataset, image_folder: Path) -> None:
    for sample in dataset.read(np.array([29, 0, 7, 0])):
        assert sample.bytes == (image_folder / "train" / f"{sample.key}.jpg").read_bytes()
        assert sample.label == int(sample.key[6])
