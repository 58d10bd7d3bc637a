"""All access to object storage: local and shared folders (bare paths, file://) and S3-compatible stores (s3://).

Any other protocol that fsspec speaks (https://, gs://, hf://, memory://, …) is read only: `exists`, `size`, the
`read_` functions, `open_read`, `list_files`, `download_file` and `download_tree`.

The rules that every function keeps:
- An object appears whole or not at all; nothing that raises half-way publishes anything.
- Nothing depends on rename, on folders, or on a cached listing.
- Every call is retried with jitter until a deadline (ITPN_STORAGE_DEADLINE_S, 180 s), then raises
  StorageUnavailable; a refusal that no retry can change (credentials, missing bucket) raises it at once.
- Clients are made in the process that uses them, never inherited over a fork.

S3 credentials, endpoint and region come from the standard AWS_* variables, files and roles.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import unquote, urlsplit

from cluster.errors import (
    AlreadyExists,
    ConfigError,
    DataInvalid,
    ItpnError,
    NotFound,
    PreflightError,
    StorageUnavailable,
)
from cluster.foreign import ForeignObjects
from cluster.hashing import canonical_json, sha256_bytes, sha256_file
from cluster.local_files import TEMPORARY, LocalFiles
from cluster.range_file import RangeFile
from cluster.retry import DeadlineExceeded, retry
from cluster.s3_objects import S3Objects

__all__ = ["canonical_json", "sha256_bytes", "sha256_file"]

log = logging.getLogger(__name__)

PROBE_DEADLINE_S = 20.0
TELEMETRY_DEADLINE_S = 5.0
TELEMETRY_PAUSE_S = 30.0
SLOWEST_BYTES_PER_S = 1e6  # transfers get this much longer than the deadline
READ_AHEAD_BYTES = 4 << 20  # one request of open_read; at 100 MB/s it takes as long as two round trips
TREE_THREADS = 4


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its URI, size in bytes, and time of writing (seconds since the epoch)."""

    uri: str
    bytes: int
    mtime: float


@dataclass(frozen=True)
class Upload:
    """An upload that was begun and is not finished: its parts take space and are in no listing of objects."""

    uri: str
    id: str
    bytes: int
    began: float  # seconds since the epoch


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts added, in the one form that every function here returns.

    Bare paths and file:// become absolute local paths; empty parts and outer slashes vanish.
    """
    base = _normal(uri)
    extra = [part.strip("/") for part in parts if part.strip("/")]
    if "://" in base:
        return "/".join([base, *extra])
    return os.path.normpath(os.path.join(base, *extra))  # noqa: PTH118 (Path keeps "..")


def exists(uri: str) -> bool:
    """Whether there is an object of this name; a folder or prefix is none (see `list_files`)."""
    return _call(uri, "stat") is not None


def size(uri: str) -> int:
    """Size in bytes; raises NotFound."""
    found = _call(uri, "stat")
    if found is None:
        raise _not_found(uri)
    return found[0]


def read_bytes(uri: str) -> bytes:
    """The whole object, for small ones; raises NotFound."""
    return read_versioned(uri)[0]


def read_json(uri: str) -> Any:
    """The object parsed as JSON; raises NotFound, or DataInvalid when it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataInvalid(
            f"{uri} is not JSON",
            found=str(error),
            remedy="restore it from a copy, or delete what it belongs to",
        ) from None


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from offset `start`; fewer at the end of the object. Raises NotFound."""
    if length <= 0:
        return b""
    return _call(uri, "get_range", start, length, transfer_bytes=length)


def read_versioned(uri: str) -> tuple[bytes, str]:
    """The whole object and a token of this version, for `replace_if`; raises NotFound."""
    return _call(uri, "get")


def write_exclusive(uri: str, data: bytes) -> None:
    """Create the object; durable when it returns.

    When the name is taken by these very bytes it succeeds: a retried request cannot know whether its
    first try arrived. Writers that compete therefore put something of their own into `data`.

    Raises:
        AlreadyExists: when other content has the name.
    """
    try:
        _call(uri, "create", data, transfer_bytes=len(data))
    except AlreadyExists:
        try:
            if read_bytes(uri) == data:
                return
        except NotFound:
            pass  # deleted since
        raise


def write_json_exclusive(uri: str, obj: Any) -> str:
    """`write_exclusive` of `obj` as canonical JSON; returns the sha256 of the bytes."""
    data = canonical_json(obj)
    write_exclusive(uri, data)
    return sha256_bytes(data)


def write_telemetry(uri: str, obj: Any) -> None:
    """Overwrite a small JSON object that only informs (progress, failures). Never raises.

    Tries for 5 s; when that was in vain, does nothing for the next 30 s, so that an outage of the store
    hardly slows the work that reports.
    """
    global _telemetry_pause_ends
    began = time.monotonic()
    if began < _telemetry_pause_ends:
        return
    try:
        data = json.dumps(obj, default=str).encode()
        _call(uri, "put", data, False, deadline_s=TELEMETRY_DEADLINE_S)
    except Exception as error:
        log.debug("telemetry was not written: %s", error)
        if time.monotonic() - began > TELEMETRY_DEADLINE_S / 2:
            _telemetry_pause_ends = time.monotonic() + TELEMETRY_PAUSE_S


def overwrite(uri: str, data: bytes, *, deadline_s: float | None = None) -> None:
    """Write the object, over what is there; durable when it returns."""
    _call(uri, "put", data, transfer_bytes=len(data), deadline_s=deadline_s)


def replace_if(uri: str, data: bytes, version: str) -> bool:
    """Write the object if it still has `version` (of `read_versioned`); False when it changed or is gone.

    Equal contents are equal versions: where going back and forth matters, put a counter or an id into `data`.
    """
    if _call(uri, "put_if", data, version, transfer_bytes=len(data)):
        return True
    try:
        return read_bytes(uri) == data  # refused, but by our own first try: its answer was lost
    except NotFound:
        return False


def upload_file(local: Path | str, uri: str) -> tuple[int, str]:
    """Copy a local file to `uri`, over what is there; returns its size in bytes and sha256."""
    local = Path(local)
    bytes_, sha256 = local.stat().st_size, sha256_file(local)
    _call(uri, "upload", local, transfer_bytes=bytes_)
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
    _call(uri, "move", local, transfer_bytes=bytes_)
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
        _call(uri, "download", temporary, transfer_bytes=expected_bytes)
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


def open_read(uri: str) -> BinaryIO:
    """The object as a buffered, seekable binary file; every piece is read with the retries of `read_range`.

    Raises NotFound at once, not at the first read.
    """
    return io.BufferedReader(RangeFile(read_range, join(uri), size(uri)), READ_AHEAD_BYTES)


def list_files(
    uri_prefix: str, *, most: int | None = None, deadline_s: float | None = None
) -> list[ObjectInfo]:
    """The objects below the prefix, recursively, sorted by URI; [] when there is none. `most` ends it early."""
    items = _call(uri_prefix, "find", most, deadline_s=deadline_s)
    scheme = "s3://" if join(uri_prefix).startswith("s3://") else ""
    return sorted(
        (ObjectInfo(scheme + path, size, mtime) for path, size, mtime in items), key=lambda item: item.uri
    )


def list_uploads(uri_prefix: str) -> list[Upload]:
    """The unfinished uploads below the prefix, sorted by URI: multipart ones on S3, temporary files locally."""
    scheme = "s3://" if join(uri_prefix).startswith("s3://") else ""
    found = [Upload(scheme + path, *facts) for path, *facts in _call(uri_prefix, "uploads")]
    return sorted(found, key=lambda upload: (upload.uri, upload.id))


def abort_upload(upload: Upload) -> None:
    """Drop an unfinished upload and what it has stored; its writer, if any, fails. No error when it is gone."""
    _call(upload.uri, "abort_upload", upload.id)


def delete(uri: str) -> None:
    """Remove the object; no error when there is none."""
    _call(uri, "delete")


def delete_tree(uri_prefix: str) -> None:
    """Remove every object below the prefix; no error when there is none."""
    _call(uri_prefix, "delete_tree")


def probe_preconditions(root: str) -> None:
    """Check that `root` answers, can be written, and refuses a second create and a stale replacement.

    Some S3-compatible stores accept the preconditions and ignore them; leases, records and aliases would
    then overwrite each other in silence.

    Raises:
        PreflightError: when a precondition is ignored.
        StorageUnavailable: when the store does not answer within 20 s or refuses access.
    """
    uri = join(root, f".probe-{uuid.uuid4().hex}")

    ignored = []
    try:
        _call(uri, "put", b"first", deadline_s=PROBE_DEADLINE_S)
        with contextlib.suppress(AlreadyExists):
            _call(uri, "create", b"second", deadline_s=PROBE_DEADLINE_S)
            ignored.append("If-None-Match")
        _, stale = _call(uri, "get", deadline_s=PROBE_DEADLINE_S)
        _call(uri, "put", b"third", deadline_s=PROBE_DEADLINE_S)
        if _call(uri, "put_if", b"fourth", stale, deadline_s=PROBE_DEADLINE_S):
            ignored.append("If-Match")
    finally:
        with contextlib.suppress(ItpnError):
            _call(uri, "delete", deadline_s=2.0)
    if ignored:
        raise PreflightError(
            f"the object store of {root} ignores conditional writes",
            expected="a second exclusive create and a stale replacement are refused (HTTP 412)",
            found=f"{' and '.join(ignored)} accepted and ignored",
            remedy="use a store with conditional writes (AWS S3, SeaweedFS, MinIO, …)",
        )


# ---- the stores, and what surrounds every call of them


def _normal(uri: str) -> str:
    if uri.startswith("s3://"):
        bucket = uri[5:].strip("/")
        if not bucket:
            raise ConfigError(f"'{uri}' names no bucket", expected="s3://BUCKET/…")
        return "s3://" + bucket
    if uri.startswith("file:"):
        uri = unquote(urlsplit(uri).path)
    elif "://" in uri:
        _require_protocol(uri)
        return uri.rstrip("/")
    return os.path.abspath(uri)  # noqa: PTH100 (Path.resolve would follow links)


def _store(uri: str) -> tuple[Any, str]:
    normal = _normal(uri)
    if normal.startswith("s3://"):
        return _s3(), normal[5:]
    return (_foreign() if "://" in normal else _LOCAL), normal


def _not_writable(uri: str) -> ConfigError:
    return ConfigError(
        f"'{uri}' is not a kind of storage that this project writes to",
        expected="a local path, file:///… or s3://BUCKET/…",
        remedy="most object stores speak S3: set AWS_ENDPOINT_URL to theirs and use s3://",
    )


def _require_protocol(uri: str) -> None:
    """Raise ConfigError unless fsspec knows the protocol and the package that speaks it is installed."""
    import fsspec

    protocol = uri.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigError(
            f"reading '{uri}' needs a package that is not installed",
            expected=f"an fsspec file system for {protocol}://",
            found=str(error),
            remedy="install it, or, where the store speaks S3, set AWS_ENDPOINT_URL to it and use s3://",
        ) from None
    except ValueError:
        raise _not_writable(uri) from None


@functools.cache
def _foreign() -> ForeignObjects:
    import aiohttp
    import fsspec
    from fsspec.exceptions import FSTimeoutError

    def open_filesystem(uri: str) -> tuple[Any, str]:
        options: dict[str, Any] = {"use_listings_cache": False}
        if uri.startswith(("http://", "https://")):
            # aiohttp's own limit is five minutes for a whole answer, which cuts large files off.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": limits}
        return fsspec.url_to_fs(uri, **options)

    passing = (ConnectionError, TimeoutError, FSTimeoutError)
    return ForeignObjects(
        open_filesystem, (*passing, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
    )


_LOCAL = LocalFiles()
_telemetry_pause_ends = 0.0
_S3: dict[tuple[str | int | None, ...], S3Objects] = {}


def _s3() -> S3Objects:
    """This process's S3 client; another one after a fork, or when the environment names another store."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION")
    # Clients of a parent process stay in the dict untouched: closing one here would reach into the
    # parent's event loop, with which it shares the epoll descriptor.
    key = (os.getpid(), *(os.environ.get(name) for name in names))
    if key not in _S3:
        from botocore.exceptions import BotoCoreError, IncompleteReadError, SSLError
        from botocore.exceptions import ConnectionError as BotoConnectionError
        from s3fs import S3FileSystem
        from s3fs.core import S3_RETRYABLE_ERRORS

        filesystem = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "max_attempts": 10},
                "read_timeout": 60,
                "max_pool_connections": 64,
            },
        )
        filesystem.retries = 1  # its own back-off has no jitter; botocore's and ours do
        _S3[key] = S3Objects(
            filesystem,
            endpoint=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS S3",
            transient_errors=(
                *S3_RETRYABLE_ERRORS,
                BotoConnectionError,
                IncompleteReadError,
                ConnectionError,
            ),
            fatal_errors=(SSLError,),
            client_errors=(BotoCoreError, ValueError),
        )
    return _S3[key]


_VERBS = {
    "stat": "look up",
    "get": "read",
    "get_range": "read",
    "put": "write",
    "put_if": "replace",
    "find": "list",
    "uploads": "list the uploads below",
    "abort_upload": "abort the upload of",
}


def _call(
    uri: str, method: str, *arguments: Any, transfer_bytes: int = 0, deadline_s: float | None = None
) -> Any:
    """`store.method(path, *arguments)` with retries; every failure becomes an error of ours.

    Each attempt is told how many seconds it has (`timeout_s`): the rest of the deadline, which is longer
    where many bytes move.
    """
    store, path = _store(uri)
    operation = getattr(store, method, None)
    if operation is None:  # a store that is read only
        raise _not_writable(uri)
    if deadline_s is None:
        deadline_s = _deadline_s() + transfer_bytes / SLOWEST_BYTES_PER_S
    action = _VERBS.get(method, method.replace("_tree", ""))
    try:
        return retry(
            lambda left_s: operation(path, *arguments, timeout_s=left_s),
            transient=store.transient,
            deadline_s=deadline_s,
        )
    except DeadlineExceeded as error:
        raise StorageUnavailable(
            f"cannot {action} {uri}: gave up after {error.elapsed_s:.0f} s (attempt {error.attempts})",
            found=store.describe(error.cause),
            remedy=store.explain(error.cause),
        ) from error.cause
    except ItpnError:
        raise
    except FileNotFoundError as error:
        if not store.missing(error):
            _raise_refusal(store, uri, action, error)
        raise _not_found(uri) from None
    except FileExistsError:
        raise AlreadyExists(
            f"{uri} is already there", remedy="it belongs to another writer: read it"
        ) from None
    except Exception as error:
        _raise_refusal(store, uri, action, error)


def _deadline_s() -> float:
    text = os.environ.get("ITPN_STORAGE_DEADLINE_S", "180")
    try:
        return float(text)
    except ValueError:
        raise ConfigError("ITPN_STORAGE_DEADLINE_S is no number", expected="seconds", found=text) from None


def _raise_refusal(store: Any, uri: str, action: str, error: Exception) -> NoReturn:
    remedy = store.explain(error)
    if remedy is None:
        raise error
    raise StorageUnavailable(f"cannot {action} {uri}", found=store.describe(error), remedy=remedy) from error


def _not_found(uri: str) -> NotFound:
    return NotFound(
        f"{uri} is not there", remedy="check the path; if it should exist, run the step that makes it"
    )


def _differs(uri: str, expected: str, found: str) -> DataInvalid:
    return DataInvalid(
        f"{uri} is not what its manifest says",
        expected=expected,
        found=found,
        remedy="the object was damaged or replaced: restore it, or make it again under a new version",
    )
