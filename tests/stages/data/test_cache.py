"""The node's shard cache: bounded, shared by processes, distrustful."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from cluster.storage.local_files import TEMPORARY
from stages.data.cache import ShardCache


def make_shard(folder: Path, number: int, size: int = 1000) -> dict:
    data = bytes([number]) * size
    path = folder / f"shard-{number}.tar"
    path.write_bytes(data)
    return {"uri": str(path), "size": size, "sha256": storage.sha256_bytes(data)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def total(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.glob("*.tar"))


def test_a_copy_is_fetched_once_and_then_served(store: Path, tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path / "cache", 10_000), make_shard(store, 1)
    path = cache.ensure(**shard)
    Path(shard["uri"]).unlink()
    assert cache.ensure(**shard) == path
    assert path.read_bytes() == bytes([1]) * 1000


def test_the_least_recently_used_copies_go_first_and_the_bound_holds(store: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3500)
    shards = [make_shard(store, number) for number in range(6)]
    for number in (0, 1, 2):
        cache.ensure(**shards[number])
        time.sleep(0.01)
    cache.ensure(**shards[0])  # used again: 1 is now the oldest
    time.sleep(0.01)
    cache.ensure(**shards[3])
    assert total(cache) == 3000
    kept = {path.read_bytes()[0] for path in cache.folder.glob("*.tar")}
    assert kept == {0, 2, 3}
    for shard in shards * 2:
        cache.ensure(**shard)
        assert total(cache) <= 3500


@pytest.mark.parametrize("damage", [lambda data: b"x" + data[1:], lambda data: data[:-1], lambda data: b""])
def test_a_damaged_copy_is_fetched_again(store: Path, tmp_path: Path, damage) -> None:
    shard = make_shard(store, 1)
    path = ShardCache(tmp_path / "cache", 10_000).ensure(**shard)
    path.write_bytes(damage(path.read_bytes()))
    assert ShardCache(tmp_path / "cache", 10_000).ensure(**shard).read_bytes() == bytes([1]) * 1000


def test_a_copy_whose_stamp_was_lost_is_checked_not_fetched(store: Path, tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path / "cache", 10_000), make_shard(store, 1)
    path = cache.ensure(**shard)
    path.with_suffix(".ok").unlink()
    Path(shard["uri"]).unlink()
    assert cache.ensure(**shard) == path


def test_a_shard_that_is_not_what_the_manifest_says_is_an_error(store: Path, tmp_path: Path) -> None:
    shard = make_shard(store, 1)
    Path(shard["uri"]).write_bytes(bytes([2]) * 1000)
    with pytest.raises(DataInvalid, match="sha256"):
        ShardCache(tmp_path / "cache", 10_000).ensure(**shard)
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_shard_larger_than_the_cache_is_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit the cache"):
        ShardCache(tmp_path / "cache", 500).ensure(**make_shard(store, 1))


def _die_while_downloading(folder: str, shard: dict) -> None:
    def die(uri: str, local: Path, **facts: object) -> None:
        Path(local).with_name(f"{TEMPORARY}half").write_bytes(b"x" * 500)
        os._exit(9)

    storage.download_file = die
    ShardCache(folder, 1500).ensure(**shard)


def test_what_a_killed_download_left_takes_no_room(store: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1500)
    killed = multiprocessing.get_context("fork").Process(
        target=_die_while_downloading, args=(str(cache.folder), make_shard(store, 1))
    )
    killed.start()
    killed.join()
    [left] = cache.folder.glob(f"*.part/{TEMPORARY}*")
    cache.ensure(**make_shard(store, 2))  # would not fit beside what is left, nor beside its reservation
    assert not left.exists() and not list(cache.folder.glob("*.part"))
    cache.ensure(**make_shard(store, 1))
    assert total(cache) == 1000


def test_temporary_files_that_nobody_claims_are_swept_when_old(store: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10_000)
    stale, fresh = (cache.folder / f"{TEMPORARY}{name}" for name in ("stale", "fresh"))
    stale.write_bytes(b"x" * 500)
    fresh.write_bytes(b"x")
    os.utime(stale, (time.time() - 7200,) * 2)
    cache.ensure(**make_shard(store, 1))
    assert not stale.exists() and fresh.exists()


def test_downloads_at_once_stay_within_the_bound(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path / "cache", 2500)
    shards = [make_shard(store, number) for number in range(6)]
    download, lock, peaks, at_once = storage.download_file, threading.Lock(), [], []

    def slow(uri: str, local: Path, **facts: Any) -> None:
        with lock:
            at_once.append(len(list(cache.folder.glob("*.part"))))
        download(uri, local, **facts)
        time.sleep(0.05)
        with lock:
            peaks.append(
                sum(p.stat().st_size for p in cache.folder.rglob("*") if p.name == "copy") + total(cache)
            )

    monkeypatch.setattr(storage, "download_file", slow)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda shard: cache.ensure(**shard), shards))
    assert max(at_once) == 2 and max(peaks) == 2000 and len(peaks) == 6


def _hammer(folder: str, shards: list[dict], seed: int) -> int:
    cache, good = ShardCache(folder, 2500), 0
    for turn in range(40):
        shard = shards[(turn * (seed + 3) + seed) % len(shards)]
        for _ in range(20):
            path = cache.ensure(**shard)
            try:
                good += storage.sha256_bytes(path.read_bytes()) == shard["sha256"]
                break
            except FileNotFoundError:
                continue  # another process made room in between, as the data set's reader expects
    return good


def test_processes_share_a_cache_too_small_for_them(store: Path, tmp_path: Path) -> None:
    shards = [make_shard(store, number) for number in range(5)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        good = pool.starmap(_hammer, [(str(tmp_path / "cache"), shards, seed) for seed in range(2)])
    assert good == [40, 40]
    assert total(ShardCache(tmp_path / "cache", 2500)) <= 2500
