"""Which code runs: the commit when there is one, else the installed version."""

from __future__ import annotations

import platform
import socket
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
_LIBRARIES = ("torch", "deepspeed", "ray", "webdataset", "fsspec", "s3fs", "transformers", "numpy")


@cache
def code_version() -> str:
    """`<commit>` (12 hex digits), with `+changed` when files of the packages differ from it; without git,
    `v<version>` of the installed package."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "pipeline", "stages", "cluster")
    except (OSError, subprocess.CalledProcessError):
        return "v" + metadata.version("itpn-pipeline")
    return commit + ("+changed" if changed else "")


@cache
def library_versions() -> dict[str, str]:
    """Installed versions of what the results depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def host() -> str:
    """Name of this machine."""
    return socket.gethostname()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
