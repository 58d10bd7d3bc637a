"""Storage under faults: refused and lost requests, dead endpoints, wrong keys, stores that ignore preconditions."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from cluster import storage
from cluster.errors import AlreadyExists, PreflightError, StorageUnavailable
from cluster.retry import DeadlineExceeded, retry


def test_refused_requests_are_repeated_until_they_succeed(proxy, moto_root):
    uri = storage.join(moto_root, "x")
    for operation in (
        lambda: storage.write_exclusive(uri, b"data"),
        lambda: storage.exists(uri),
        lambda: storage.read_bytes(uri),
        lambda: storage.list_files(moto_root),
        lambda: storage.delete(uri),
    ):
        proxy.refuse = 1
        operation()
        assert proxy.refuse == 0
    assert storage.list_files(moto_root) == []


def test_a_store_that_keeps_refusing_is_unavailable_after_the_deadline(proxy, moto_root, monkeypatch):
    assert not storage.exists(
        storage.join(moto_root, "x")
    )  # the client is made: the deadline is for requests alone
    monkeypatch.setenv("ITPN_STORAGE_DEADLINE_S", "3")
    proxy.refuse = 10**6
    began = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        storage.read_bytes(storage.join(moto_root, "x"))
    assert time.monotonic() - began < 90, "half of what is the usual deadline"
    assert caught.value.exit_code == 4
    assert "gave up after" in str(caught.value)
    assert "503" in str(caught.value), "the message says what the store answered"
    assert f"{proxy.server_address[1]}" in str(caught.value), "the message names the endpoint"


def test_a_create_whose_answer_was_lost_still_succeeds(proxy, moto_root):
    uri = storage.join(moto_root, "record.json")
    proxy.methods, proxy.lose = {"PUT"}, 1
    storage.write_exclusive(uri, b"mine")
    assert proxy.lose == 0
    assert storage.read_bytes(uri) == b"mine"
    with pytest.raises(AlreadyExists):
        storage.write_exclusive(uri, b"another's")


def test_a_replacement_whose_answer_was_lost_still_succeeds(proxy, moto_root):
    uri = storage.join(moto_root, "alias")
    storage.write_exclusive(uri, b"one")
    _, version = storage.read_versioned(uri)
    proxy.methods, proxy.lose = {"PUT"}, 1
    assert storage.replace_if(uri, b"two", version)
    assert storage.read_bytes(uri) == b"two"


def test_an_upload_whose_answer_was_lost_is_repeated(proxy, moto_root, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    proxy.methods, proxy.lose = {"PUT"}, 2
    storage.upload_file(tmp_path / "file", storage.join(moto_root, "file"))
    assert storage.size(storage.join(moto_root, "file")) == 1000


def test_a_store_that_ignores_preconditions_fails_the_probe(proxy, moto_root):
    storage.probe_preconditions(moto_root)
    assert storage.list_files(moto_root) == [], "the probe cleans up"
    proxy.strip = {"if-none-match"}
    with pytest.raises(PreflightError, match="If-None-Match accepted and ignored") as caught:
        storage.probe_preconditions(moto_root)
    assert caught.value.exit_code == 2
    proxy.strip = {"if-match"}
    with pytest.raises(PreflightError, match="If-Match accepted and ignored"):
        storage.probe_preconditions(moto_root)
    assert storage.list_files(moto_root) == []


def test_real_stores_pass_the_probe(real_root):
    storage.probe_preconditions(real_root)
    assert storage.list_files(real_root) == []


def test_an_outage_costs_telemetry_one_attempt_only(moto_root, monkeypatch):
    monkeypatch.setattr("cluster.storage.documents.TELEMETRY_DEADLINE_S", 0.4)
    monkeypatch.setattr("cluster.storage.documents.TELEMETRY_PAUSE_S", 3600.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    call, called = storage.documents.calls.call, []
    monkeypatch.setattr(
        storage.documents.calls,
        "call",
        lambda *args, **options: (called.append(1), call(*args, **options))[1],
    )
    for _ in range(100):
        storage.write_telemetry(storage.join(moto_root, "progress.json"), {"done": 1})
    # An attempt may end early, when the next delay would pass its deadline, and is then no reason to pause.
    assert 1 <= len(called) < 20


def test_a_dead_endpoint_is_named(moto_root, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ITPN_STORAGE_DEADLINE_S", "1")
    with pytest.raises(StorageUnavailable, match=r"http://127\.0\.0\.1:9 is reachable"):
        storage.exists(storage.join(moto_root, "x"))


def test_wrong_keys_and_missing_buckets_fail_at_once_with_the_remedy(seaweedfs_root, monkeypatch):
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match="create the bucket"):
        storage.overwrite("s3://no-such-bucket/x", b"")
    with pytest.raises(StorageUnavailable, match="create the bucket"):
        storage.list_files("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    with pytest.raises(StorageUnavailable, match="set AWS_ACCESS_KEY_ID"):
        storage.overwrite(storage.join(seaweedfs_root, "x"), b"")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StorageUnavailable, match="set AWS_ACCESS_KEY_ID"):
        storage.exists(storage.join(seaweedfs_root, "x"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no-url")
    with pytest.raises(StorageUnavailable, match="AWS_ENDPOINT_URL"):
        storage.exists(storage.join(seaweedfs_root, "x"))
    assert time.monotonic() - began < 120, "one of these tried until the deadline is 180 s"


def test_retry_stops_at_the_deadline_and_reports_the_telling_error(monkeypatch):
    slept = []
    monkeypatch.setattr("cluster.retry.time", SimpleNamespace(monotonic=lambda: sum(slept)))

    def attempt(left_s):
        if len(slept) > 3:
            raise TimeoutError
        raise ConnectionError("refused")

    with pytest.raises(DeadlineExceeded) as caught:
        retry(
            attempt,
            transient=lambda error: True,
            deadline_s=30.0,
            sleep=slept.append,
        )
    assert isinstance(caught.value.cause, ConnectionError)
    assert caught.value.elapsed_s == sum(slept) <= 30.0
    assert len(set(slept)) == len(slept) > 4, "delays are drawn at random"


def test_retry_passes_lasting_errors_on_at_once():
    calls = []

    def attempt(left_s):
        calls.append(left_s)
        raise PermissionError

    with pytest.raises(PermissionError):
        retry(attempt, transient=lambda error: isinstance(error, TimeoutError), deadline_s=60)
    assert len(calls) == 1
