"""Objects to and from local files: whole, in trees, verified."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.errors import DataInvalid, StorageUnavailable
from cluster.hashing import sha256_file
from cluster.storage import calls
from cluster.storage.local_files import TEMPORARY
from cluster.storage.reading import list_files, size
from cluster.storage.uris import join

TREE_THREADS = 4


def upload_file(local: Path | str, uri: str) -> tuple[int, str]:
    """Copy a local file to `uri`, over what is there; returns its size in bytes and sha256."""
    local = Path(local)
    bytes_, sha256 = local.stat().st_size, sha256_file(local)
    calls.call(uri, "upload", local, transfer_bytes=bytes_)
    if (stored := size(uri)) != bytes_:
        raise StorageUnavailable(
            f"{uri} was stored incompletely",
            expected=f"{bytes_} bytes",
            found=f"{stored} bytes",
            remedy="run again; if it repeats, the object store loses data",
        )
    return bytes_, sha256


def move_file(local: Path | str, uri: str) -> None:
    """Publish a local file whose content is complete, over what is there; durable when it returns.

    Within one local file system it is a rename. The caller knows its size and hash; nothing is read twice.
    """
    local = Path(local)
    bytes_ = local.stat().st_size
    calls.call(uri, "move", local, transfer_bytes=bytes_)
    if (stored := size(uri)) != bytes_:
        raise StorageUnavailable(
            f"{uri} was stored incompletely",
            expected=f"{bytes_} bytes",
            found=f"{stored} bytes",
            remedy="run again; if it repeats, the object store loses data",
        )


def upload_tree(local_dir: Path | str, uri_prefix: str) -> list[tuple[str, int, str]]:
    """Upload every file below `local_dir`; returns (relative path, bytes, sha256), sorted by path."""
    local_dir = Path(local_dir)
    names = sorted(path.relative_to(local_dir).as_posix() for path in local_dir.rglob("*") if path.is_file())
    with ThreadPoolExecutor(TREE_THREADS) as pool:
        facts = pool.map(lambda name: upload_file(local_dir / name, join(uri_prefix, name)), names)
        return [(name, *fact) for name, fact in zip(names, facts, strict=True)]


def download_file(
    uri: str, local: Path | str, *, sha256: str | None = None, bytes: int | None = None
) -> None:
    """Copy the object to a local file, which appears only when it is complete and verified.

    Raises NotFound, or DataInvalid when size or sha256 differ from those given.
    """
    local = Path(local)
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = local.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    expected_bytes = size(uri)
    if bytes is not None and expected_bytes != bytes:
        raise _differs(uri, f"{bytes} bytes", f"{expected_bytes} bytes")
    try:
        calls.call(uri, "download", temporary, transfer_bytes=expected_bytes)
        if (found := temporary.stat().st_size) != expected_bytes:
            raise _differs(uri, f"{expected_bytes} bytes", f"{found} bytes")
        if sha256 is not None and (digest := sha256_file(temporary)) != sha256:
            raise _differs(uri, f"sha256 {sha256}", f"sha256 {digest}")
        temporary.replace(local)
    finally:
        temporary.unlink(missing_ok=True)


def download_tree(uri_prefix: str, local_dir: Path | str) -> None:
    """Copy every object below the prefix to a file below `local_dir`."""
    prefix = join(uri_prefix)
    items = list_files(prefix)
    with ThreadPoolExecutor(TREE_THREADS) as pool:
        jobs = [
            pool.submit(download_file, item.uri, Path(local_dir) / item.uri[len(prefix) :].lstrip("/"))
            for item in items
        ]
        for job in jobs:
            job.result()


def _differs(uri: str, expected: str, found: str) -> DataInvalid:
    return DataInvalid(
        f"{uri} is not what its manifest says",
        expected=expected,
        found=found,
        remedy="the object was damaged or replaced: restore it, or make it again under a new version",
    )
