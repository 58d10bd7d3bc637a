"""Object stores for tests: local folders, an S3 double in this process (moto), a real S3 server (SeaweedFS)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import devstore


@dataclass(frozen=True)
class S3Server:
    """A running S3 server: the environment that reaches it, a bucket in it, and its folder if it has one."""

    env: dict[str, str]
    bucket: str
    folder: Path | None = None

    @property
    def url(self) -> str:
        return self.env["AWS_ENDPOINT_URL"]


@pytest.fixture(autouse=True)
def telemetry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that one test took down must not silence the telemetry of the next (storage pauses it for 30 s)."""
    monkeypatch.setattr("cluster.storage.documents._telemetry_pause_ends", 0.0)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS of this test process, on 127.0.0.1."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    env = devstore.start(folder)
    yield S3Server(env, env["ITPN_DEV_BUCKET"], folder)
    devstore.stop(folder)


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """moto's S3 on 127.0.0.1: starts in no time, checks no signatures."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        region_name=env["AWS_REGION"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    ).create_bucket(Bucket="itpn")
    yield S3Server(env, "itpn")
    server.stop()


@pytest.fixture
def seaweedfs_root(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty s3:// root on SeaweedFS, with the environment that reaches it."""
    return _root(seaweedfs, monkeypatch)


@pytest.fixture
def moto_root(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty s3:// root on moto, with the environment that reaches it."""
    return _root(moto, monkeypatch)


@pytest.fixture(params=["local", "moto", "seaweedfs"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root on each kind of store."""
    if request.param == "local":
        return str(tmp_path / "root")
    return request.getfixturevalue(f"{request.param}_root")


@pytest.fixture(params=["local", "seaweedfs"])
def real_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root on each kind of store that people use."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("seaweedfs_root")


def _root(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket}/{uuid.uuid4().hex[:12]}"
