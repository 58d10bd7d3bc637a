"""Other protocols are read through fsspec, never written: memory:// here, and a web server of this process."""

from __future__ import annotations

import functools
import http.server
import threading
import uuid

import fsspec
import pytest

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, NotFound, StorageUnavailable

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def memory():
    root = f"memory://{uuid.uuid4().hex}"
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe(f"{root}/a/one.bin", CONTENT)
    filesystem.pipe(f"{root}/a/b/two.json", b'{"x": 1}')
    yield root
    filesystem.rm(root, recursive=True)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers as Python's own server does, which ignores ranges; names that begin with `no-` are refused."""

    def send_head(self):
        if "/no-" in self.path:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    (tmp_path / "one.bin").write_bytes(CONTENT)
    (tmp_path / "no-entry.bin").write_bytes(CONTENT)
    handler = functools.partial(Handler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["memory", "web"])
def uri(request):
    root = request.getfixturevalue(request.param)
    return f"{root}/a/one.bin" if request.param == "memory" else f"{root}/one.bin"


def test_an_object_is_read_whole_in_ranges_and_as_a_file(uri, tmp_path):
    assert storage.exists(uri) and not storage.exists(uri + "x")
    assert storage.size(uri) == 1024
    assert storage.read_bytes(uri) == CONTENT
    assert storage.read_range(uri, 3, 4) == CONTENT[3:7]
    assert storage.read_range(uri, 1020, 100) == CONTENT[1020:]
    assert storage.read_range(uri, 24, 1000) == CONTENT[24:]
    assert storage.read_range(uri, 24, 1024) == CONTENT[24:]
    assert storage.read_range(uri, 1024, 5) == b""
    with storage.open_read(uri) as file:
        file.seek(-10, 2)
        assert file.read() == CONTENT[-10:]
    storage.download_file(uri, tmp_path / "copy", sha256=storage.sha256_bytes(CONTENT), bytes=1024)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(DataInvalid, match="sha256"):
        storage.download_file(uri, tmp_path / "other", sha256="0" * 64)


def test_objects_below_a_prefix_are_listed_and_copied(memory, tmp_path):
    assert storage.join(memory, "a/", "b") == f"{memory}/a/b"
    assert not storage.exists(f"{memory}/a")
    found = storage.list_files(memory)
    assert [(item.uri, item.bytes) for item in found] == [
        (f"{memory}/a/b/two.json", 8),
        (f"{memory}/a/one.bin", 1024),
    ]
    assert all(item.mtime > 1e9 for item in found)
    assert len(storage.list_files(memory, most=1)) == 1
    assert storage.list_files(f"{memory}/a/one.bin") == storage.list_files(f"{memory}/z") == []
    assert storage.read_json(f"{memory}/a/b/two.json") == {"x": 1}
    storage.download_tree(f"{memory}/a", tmp_path)
    assert (tmp_path / "b/two.json").read_bytes() == b'{"x": 1}'


def test_what_is_missing_or_refused_is_told_apart(memory, web, monkeypatch):
    for uri in (f"{memory}/none", f"{web}/none"):
        with pytest.raises(NotFound, match="none is not there"):
            storage.read_bytes(uri)
        with pytest.raises(NotFound):
            storage.open_read(uri)
    for read in (storage.exists, storage.read_bytes):
        with pytest.raises(StorageUnavailable, match=r"403(.|\n)*credentials"):
            read(f"{web}/no-entry.bin")
    monkeypatch.setenv("ITPN_STORAGE_DEADLINE_S", "0.5")
    with pytest.raises(StorageUnavailable, match="gave up after"):  # nothing listens on port 1
        storage.exists("http://127.0.0.1:1/x")


def test_writing_is_refused(memory, tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    uri = f"{memory}/x"
    for write in (
        lambda: storage.write_exclusive(uri, b""),
        lambda: storage.overwrite(uri, b""),
        lambda: storage.upload_file(tmp_path / "x", uri),
        lambda: storage.delete(uri),
        lambda: storage.delete_tree(memory),
        lambda: storage.probe_preconditions(memory),
    ):
        with pytest.raises(
            ConfigError, match=r"not a kind of storage that this project writes to(.|\n)*s3://"
        ):
            write()
    assert len(storage.list_files(memory)) == 2


def test_a_protocol_that_nothing_installed_speaks_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="not a kind of storage"):
        storage.join("nonsense://bucket/x")

    def absent(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ConfigError, match=r"needs a package(.|\n)*install gcsfs(.|\n)*AWS_ENDPOINT_URL"):
        storage.exists("gs://bucket/x")
