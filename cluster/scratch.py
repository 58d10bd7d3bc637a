"""Temporary folders that do not outlive their process for long, even when it is killed with SIGKILL.

Each process has one folder `<parent>/itpn-<user id>/<host>-<random>`, locked while the process lives (the kernel drops
the lock with it, however it ends) and removed at its end. Who makes a new one removes those of this host that nobody
locks any more.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"
_mine: dict[tuple[int, str], Path] = {}  # by process (a fork is another one) and parent
_guard = threading.Lock()


def folder(parent: str | os.PathLike[str] | None = None) -> Path:
    """This process's own folder below `parent` (by default the system's folder for temporary files).

    Use it as `tempfile`'s `dir`. It is removed when the process ends.
    """
    base = Path(parent or tempfile.gettempdir()).absolute() / f"itpn-{os.getuid()}"
    key = os.getpid(), str(base)
    with _guard:
        if key not in _mine or not _mine[key].exists():
            base.mkdir(parents=True, exist_ok=True)
            host = socket.gethostname()  # other hosts may share `base`; their locks are not ours to judge
            with _held(base / f"{host}{_LOCK}"):  # nobody sweeps between making a folder and locking it
                _sweep(base, host)
                made = Path(tempfile.mkdtemp(prefix=f"{host}-", dir=base))
                descriptor = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # and kept open until the process ends
            _mine[key] = made
            atexit.register(_remove, os.getpid(), made)
        return _mine[key]


def _sweep(base: Path, host: str) -> None:
    """Remove the folders of this host whose process is gone.

    One without a lock file is left: a cleaner of old files may have taken that of a process that is at work.
    """
    for found in base.glob(f"{host}-*"):
        if found.name.rpartition("-")[0] != host:  # node-1's, seen from node
            continue
        with suppress(OSError):  # locked (it is in use), without a lock file, or gone meanwhile
            descriptor = os.open(found / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(found, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove(owner: int, path: Path) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
