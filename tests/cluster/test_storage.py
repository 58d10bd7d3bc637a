"""Storage behaves alike on local folders, moto and SeaweedFS."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import AlreadyExists, ConfigError, DataInvalid, NotFound, StorageUnavailable
from tests.uploads import begin_upload


def test_join_makes_one_form_of_a_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.join("s3://bucket/a/", "/b/", "", "c.json") == "s3://bucket/a/b/c.json"
    assert storage.join("runs", "x/y") == str(tmp_path / "runs/x/y")
    assert storage.join(f"file://{tmp_path}/a%20b", "c") == str(tmp_path / "a b/c")
    with pytest.raises(ConfigError, match="s3://BUCKET"):
        storage.join("s3://", "x")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        storage.exists("gs://bucket/x")


def test_what_is_written_is_read_back(any_root):
    uri = storage.join(any_root, "a", "data ü+%.bin")
    assert not storage.exists(uri)
    storage.overwrite(uri, b"0123456789")
    assert storage.exists(uri)
    assert not storage.exists(storage.join(any_root, "a"))
    assert storage.size(uri) == 10
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 8, 100) == b"89"
    assert storage.read_range(uri, 10, 5) == b""
    assert storage.read_range(uri, 3, 0) == b""


def test_json_is_canonical(any_root):
    uri = storage.join(any_root, "x.json")
    digest = storage.write_json_exclusive(uri, {"b": [1, 2.5], "a": "é"})
    assert storage.read_bytes(uri) == '{"a":"é","b":[1,2.5]}'.encode()
    assert digest == storage.sha256_bytes(storage.read_bytes(uri))
    assert storage.read_json(uri) == {"a": "é", "b": [1, 2.5]}
    with pytest.raises(ValueError):
        storage.canonical_json({"loss": float("nan")})


def test_a_missing_local_file_below_a_folder_named_bucket_is_only_missing(tmp_path):
    with pytest.raises(NotFound):
        storage.read_bytes(str(tmp_path / "bucket" / "x"))


def test_broken_json_and_missing_objects_are_data_errors(any_root):
    uri = storage.join(any_root, "x.json")
    for read in (
        storage.read_json,
        storage.read_bytes,
        storage.size,
        storage.open_read,
        storage.read_versioned,
    ):
        with pytest.raises(NotFound, match="is not there") as caught:
            read(uri)
        assert caught.value.exit_code == 5
    storage.overwrite(uri, b"{")
    with pytest.raises(DataInvalid, match="is not JSON"):
        storage.read_json(uri)


def test_second_exclusive_create_is_refused_and_changes_nothing(any_root):
    uri = storage.join(any_root, "record.json")
    storage.write_exclusive(uri, b"first")
    storage.write_exclusive(uri, b"first")  # the same bytes: a retry of ours
    with pytest.raises(AlreadyExists, match=r"record\.json"):
        storage.write_exclusive(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_replace_if_refuses_a_stale_version(any_root):
    uri = storage.join(any_root, "alias")
    storage.write_exclusive(uri, b"one")
    data, version = storage.read_versioned(uri)
    assert data == b"one"
    assert storage.replace_if(uri, b"two", version)
    assert not storage.replace_if(uri, b"three", version)
    assert storage.read_bytes(uri) == b"two"
    assert not storage.replace_if(storage.join(any_root, "never"), b"x", version)


def test_listing_is_recursive_sorted_and_in_the_form_of_join(any_root):
    assert storage.list_files(any_root) == []
    before = time.time()
    for name in ("b", "a/x", "a/y/z", "a-side"):
        storage.overwrite(storage.join(any_root, name), name.encode())
    items = storage.list_files(any_root)
    assert [item.uri for item in items] == sorted(
        storage.join(any_root, n) for n in ("b", "a/x", "a/y/z", "a-side")
    )
    assert {item.bytes for item in items} == {1, 3, 5, 6}
    assert all(abs(item.mtime - before) < 60 for item in items)
    assert [i.uri for i in storage.list_files(storage.join(any_root, "a"))] == [
        storage.join(any_root, "a/x"),
        storage.join(any_root, "a/y/z"),
    ]


def test_delete_removes_what_is_there_and_minds_nothing_else(any_root):
    for name in ("t/a", "t/b/c", "tt"):
        storage.overwrite(storage.join(any_root, name), b"x")
    storage.delete(storage.join(any_root, "t/a"))
    storage.delete(storage.join(any_root, "t/a"))
    storage.delete_tree(storage.join(any_root, "t"))
    storage.delete_tree(storage.join(any_root, "t"))
    assert [item.uri for item in storage.list_files(any_root)] == [storage.join(any_root, "tt")]


def test_writers_and_deleters_of_a_local_tree_do_not_trip_each_other(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    root = tmp_path / "root"
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(storage.overwrite, str(root / f"a/{i % 7}"), b"x") for i in range(200)]
        deletes = [pool.submit(storage.delete_tree, str(root)) for _ in range(50)]
        for job in writes + deletes:
            job.result()


def test_listing_and_deleting_go_beyond_one_page(seaweedfs_root, monkeypatch):
    monkeypatch.setattr("cluster.storage.s3_objects.LIST_PAGE", 3)
    monkeypatch.setattr("cluster.storage.s3_objects.DELETE_BATCH", 4)
    names = [storage.join(seaweedfs_root, "many", f"{i:04d}") for i in range(10)]
    for name in names:
        storage.overwrite(name, b"")
    assert [item.uri for item in storage.list_files(seaweedfs_root)] == names
    storage.delete_tree(seaweedfs_root)
    assert storage.list_files(seaweedfs_root) == []


def test_trees_survive_the_round_trip(any_root, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "empty").write_bytes(b"")
    (source / "deep/data").write_bytes(os.urandom(100_000))
    facts = storage.upload_tree(source, storage.join(any_root, "tree"))
    expected = [
        ("deep/data", 100_000, storage.sha256_file(source / "deep/data")),
        ("empty", 0, storage.sha256_bytes(b"")),
    ]
    assert facts == expected
    storage.download_tree(storage.join(any_root, "tree"), target)
    assert (target / "deep/data").read_bytes() == (source / "deep/data").read_bytes()
    assert (target / "empty").read_bytes() == b""


def test_a_large_file_goes_up_in_parts_and_comes_down_verified(seaweedfs_root, tmp_path, monkeypatch):
    from cluster.storage import s3_objects

    monkeypatch.setattr(s3_objects, "UPLOAD_PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_objects, "DOWNLOAD_PART_BYTES", 2 << 20)
    source, uri = tmp_path / "big", storage.join(seaweedfs_root, "big")
    source.write_bytes(os.urandom(12 << 20))
    size, digest = storage.upload_file(source, uri)
    assert (size, digest) == (12 << 20, storage.sha256_file(source))
    storage.download_file(uri, tmp_path / "back", sha256=digest, bytes=size)
    assert storage.sha256_file(tmp_path / "back") == digest


def test_a_damaged_download_is_refused_and_leaves_no_file(any_root, tmp_path):
    uri, local = storage.join(any_root, "x"), tmp_path / "down" / "x"
    storage.overwrite(uri, b"damaged")
    with pytest.raises(DataInvalid, match="sha256"):
        storage.download_file(uri, local, sha256=storage.sha256_bytes(b"intact!"))
    with pytest.raises(DataInvalid, match="99 bytes"):
        storage.download_file(uri, local, bytes=99)
    with pytest.raises(NotFound):
        storage.download_file(storage.join(any_root, "y"), local)
    assert list(local.parent.iterdir()) == []


def test_open_read_seeks_and_reads_like_a_file(any_root):
    uri, data = storage.join(any_root, "x"), os.urandom(50_000)
    storage.overwrite(uri, data)
    with storage.open_read(uri) as file:
        assert file.read(10) == data[:10]
        file.seek(-5, os.SEEK_END)
        assert file.read() == data[-5:]
        assert file.read(1) == b""
        file.seek(100)
        assert file.tell() == 100
        assert file.read() == data[100:]


def test_telemetry_never_raises(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    storage.write_telemetry(str(tmp_path / "file/below/x.json"), {"a": 1})
    storage.write_telemetry("nonsense://x", {"a": object()})
    storage.write_telemetry(str(tmp_path / "ok.json"), {"a": 1})
    assert storage.read_json(str(tmp_path / "ok.json")) == {"a": 1}


def test_a_writer_that_raises_half_way_publishes_nothing(any_root, tmp_path, monkeypatch):
    uri = storage.join(any_root, "x")

    def broken(*args, **kwargs):
        raise RuntimeError("half-way")

    if any_root.startswith("s3://"):
        from s3fs import S3FileSystem

        monkeypatch.setattr(S3FileSystem, "_upload_file_part_concurrent", broken)
        monkeypatch.setattr("cluster.storage.s3_objects.UPLOAD_PART_BYTES", 5 << 20)
    else:
        monkeypatch.setattr(os, "fsync", broken)
    (tmp_path / "big").write_bytes(bytes(11 << 20))
    with pytest.raises(RuntimeError, match="half-way"):
        storage.upload_file(tmp_path / "big", uri)
    assert not storage.exists(uri)
    assert storage.list_files(any_root) == []


def test_a_writer_killed_half_way_publishes_nothing(tmp_path):
    uri = tmp_path / "record.json"
    code = (
        "import os, signal, sys\n"
        "from cluster import storage\n"
        "os.link = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_exclusive(sys.argv[1], b'x' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(uri)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()), "the temporary file of the killed writer is still there"
    assert not storage.exists(str(uri))
    assert storage.list_files(str(tmp_path)) == []
    storage.write_exclusive(str(uri), b"mine")


def test_eight_processes_create_and_one_wins(real_root):
    uri, context = storage.join(real_root, "record.json"), multiprocessing.get_context("fork")
    # Forked on purpose, from a process that already has a client: clients must never cross a fork.
    storage.overwrite(storage.join(real_root, "warm-up"), b"")
    start, results = context.Event(), context.SimpleQueue()
    children = [context.Process(target=_create, args=(uri, i, start, results)) for i in range(8)]
    for child in children:
        child.start()
    start.set()
    outcomes = [results.get() for _ in children]
    for child in children:
        child.join(30)
    winners = [name for name, won in outcomes if won == "won"]
    assert len(winners) == 1, outcomes
    assert sorted(won for _, won in outcomes) == ["lost"] * 7 + ["won"]
    assert storage.read_bytes(uri) == winners[0]


def _create(uri, number, start, results):
    name = f"writer {number}".encode()
    start.wait(30)
    try:
        storage.write_exclusive(uri, name)
        results.put((name, "won"))
    except AlreadyExists:
        results.put((name, "lost"))
    except BaseException as error:
        results.put((name, repr(error)))


def test_compare_and_swap_under_contention_loses_no_update(real_root):
    from concurrent.futures import ThreadPoolExecutor

    uri = storage.join(real_root, "counter")
    storage.write_exclusive(uri, b"0:")

    def add(_):
        while True:
            data, version = storage.read_versioned(uri)
            count = int(data.partition(b":")[0])
            if storage.replace_if(uri, b"%d:%s" % (count + 1, os.urandom(8).hex().encode()), version):
                return

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(24)))
    assert storage.read_bytes(uri).startswith(b"24:")


def test_a_local_path_that_cannot_be_written_is_named_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="a file stands where a folder is needed") as caught:
        storage.write_exclusive(str(tmp_path / "file/x"), b"")
    assert caught.value.exit_code == 4
    with pytest.raises(NotFound):
        storage.read_bytes(str(tmp_path / "file/x"))
    with pytest.raises(NotFound):
        storage.read_bytes(str(tmp_path))


def test_a_file_system_without_hard_links_is_refused_clearly(tmp_path, monkeypatch):
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageUnavailable, match="no hard links"):
        storage.write_exclusive(str(tmp_path / "x"), b"")
    assert list(Path(tmp_path).iterdir()) == []


def test_unfinished_uploads_are_listed_below_their_prefix_only_and_dropped_one_by_one(any_root):
    other = any_root + "-other"
    for place in (storage.join(any_root, "a"), storage.join(any_root, "b"), other):
        begin_upload(place, "model.safetensors")
    storage.write_exclusive(storage.join(any_root, "a/whole"), b"whole")
    uploads = storage.list_uploads(any_root)
    assert [upload.bytes for upload in uploads] == [5 << 20, 5 << 20]
    assert [upload.uri.removeprefix(any_root)[:3] for upload in uploads] == ["/a/", "/b/"]
    storage.abort_upload(uploads[0])
    storage.abort_upload(uploads[0])
    assert storage.list_uploads(any_root) == uploads[1:] and len(storage.list_uploads(other)) == 1
    assert [item.uri for item in storage.list_files(any_root)] == [storage.join(any_root, "a/whole")]
