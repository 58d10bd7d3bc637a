"""Reading from a real S3 server (SeaweedFS), through a network that fails."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import storage
from cluster.errors import StorageUnavailable
from stages.artifacts import DatasetRef
from stages.data.batch import Batch
from stages.data.config import CacheConfig
from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.view import TrainView
from tests.conftest import S3Server
from tests.faulty_s3 import READ_FAULTS, faulty_s3
from tests.stages.images import shard_folder

STATED_RATE = 0.3  # of all requests that read; each is retried until it succeeds or the deadline passes
VIEW = TrainView(size=32)


@pytest.fixture
def remote(seaweedfs_root: str, image_folder: Path) -> DatasetRef:
    """The tiny data set, sharded straight to SeaweedFS."""
    return shard_folder(image_folder, storage.join(seaweedfs_root, "shards"), shard_samples=8)  # type: ignore[arg-type]


def collect(dataset: ShardDataset, **options: int) -> list[Batch]:
    order = Order(dataset.shard_samples, seed=1, streams=2, global_batch=6, window=2)
    with TrainFeed(dataset, order, VIEW, seed=5, epochs=2, **options) as feed:
        return list(feed)


def cache_of(tmp_path: Path, cached: bool) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache") if cached else None, max_bytes=2**20)


def test_remote_shards_are_those_of_a_local_run(remote: DatasetRef, tiny_dataset: DatasetRef) -> None:
    assert remote.manifest.startswith("s3://")
    assert remote.fingerprint == tiny_dataset.fingerprint


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "ranges"])
def test_a_failing_network_changes_no_sample(
    seaweedfs: S3Server,
    seaweedfs_root: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    local = shard_folder(image_folder, tmp_path / "out", shard_samples=2)  # many shards are many requests
    remote = shard_folder(image_folder, storage.join(seaweedfs_root, "shards"), shard_samples=2)  # type: ignore[arg-type]
    undisturbed = collect(ShardDataset.open(local.manifest, "train"))
    with faulty_s3(seaweedfs.url, STATED_RATE, READ_FAULTS) as proxy:
        proxy.methods = {"GET", "HEAD"}
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        found = collect(ShardDataset.open(remote.manifest, "train", cache_of(tmp_path, cached)))
    # Range reads ask for bytes alone; a download asks for the object's size first.
    wanted = {(method, fault) for method in ("GET", "HEAD")[: 1 + cached] for fault in READ_FAULTS}
    assert {hit for hit, count in proxy.hits.items() if hit[1] and count} == wanted, proxy.hits
    assert len(found) == len(undisturbed) == 10
    for left, right in zip(found, undisturbed, strict=True):
        assert torch.equal(left.sample_ids, right.sample_ids)
        assert torch.equal(left.images, right.images)
        assert torch.equal(left.labels, right.labels)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "ranges"])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [("503", "reduce your rate"), ("reset", "onnection|eset"), ("truncated", "ayload|onnection")],
)
def test_a_network_that_always_fails_is_a_clear_error_within_the_deadline(
    remote: DatasetRef,
    seaweedfs: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    cause: str,
    cached: bool,
) -> None:
    dataset = ShardDataset.open(remote.manifest, "train", cache_of(tmp_path, cached))
    with faulty_s3(seaweedfs.url, 1.0, (fault,)) as proxy:
        proxy.methods = {"GET"}
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.size(remote.manifest)  # makes the client: the deadline is for requests alone
        monkeypatch.setenv("ITPN_STORAGE_DEADLINE_S", "3")
        began = time.monotonic()
        with pytest.raises(StorageUnavailable) as error:
            collect(dataset)
        assert time.monotonic() - began < 90, "half of what is the usual deadline"
        assert proxy.hits["GET", fault] >= 2  # it was tried again
    verb = "download" if cached else "read"
    assert re.fullmatch(
        rf"cannot {verb} s3://.*/train-00000\d\.tar: gave up after \d+ s \(attempt \d+\)", error.value.message
    )
    assert re.search(cause, error.value.found), error.value.found
    assert proxy.url in error.value.remedy  # where to look


def test_a_cached_shard_is_read_without_the_network(
    remote: DatasetRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path, True)
    first = list(ShardDataset.open(remote.manifest, "train", cache).read(np.arange(30)))
    dataset = ShardDataset.open(remote.manifest, "train", cache)
    storage.delete_tree(remote.manifest.rsplit("/", 3)[0])
    assert list(dataset.read(np.arange(30))) == first


def test_a_rank_fetches_only_its_streams(remote: DatasetRef, tmp_path: Path) -> None:
    dataset = ShardDataset.open(remote.manifest, "train", cache_of(tmp_path, True))
    order = Order(dataset.shard_samples, seed=1, streams=2, global_batch=6, window=2)
    ids = np.concatenate([order.rank_batch(0, step, 0, 2) for step in range(order.steps_per_epoch)])
    with TrainFeed(dataset, order, VIEW, seed=5, epochs=1, rank=0, world_size=2) as feed:
        list(feed)
    needed = {dataset.shards[shard].sha256 for shard in order.shard_of(ids)}
    copied = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
    assert copied == needed and len(needed) < len(dataset.shards)


def test_shards_are_fetched_ahead_of_need(remote: DatasetRef, tmp_path: Path) -> None:
    dataset = ShardDataset.open(remote.manifest, "train", cache_of(tmp_path, True))
    order = Order(dataset.shard_samples, seed=1, streams=1, global_batch=2, window=1)
    with TrainFeed(dataset, order, VIEW, seed=5, epochs=1) as feed:
        next(feed)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "cache").glob("*.tar"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 4, "the last shard is 13 batches away"


@pytest.mark.parametrize(("window", "warned"), [(1, False), (2000, True)])
def test_a_cache_smaller_than_what_is_read_at_once_is_warned_of(
    remote: DatasetRef, tmp_path: Path, caplog: pytest.LogCaptureFixture, window: int, warned: bool
) -> None:
    dataset = ShardDataset.open(remote.manifest, "train", cache_of(tmp_path, True))
    order = Order(dataset.shard_samples, seed=1, streams=2, global_batch=6, window=window)
    with TrainFeed(dataset, order, VIEW, seed=5, epochs=1):
        assert ("raise data.cache.max_bytes" in caplog.text) == warned
