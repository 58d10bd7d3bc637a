"""Every call of a store: retried until a deadline, its failures turned into errors of ours."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from cluster.errors import (
    AlreadyExists,
    ConfigError,
    ItpnError,
    NotFound,
    StorageRefused,
    StorageUnavailable,
)
from cluster.retry import DeadlineExceeded, retry
from cluster.storage import stores
from cluster.storage.uris import not_writable

SLOWEST_BYTES_PER_S = 1e6  # transfers get this much longer than the deadline

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


def call(
    uri: str, method: str, *arguments: Any, transfer_bytes: int = 0, deadline_s: float | None = None
) -> Any:
    """`store.method(path, *arguments)` with retries; every failure becomes an error of ours.

    Each attempt is told how many seconds it has (`timeout_s`): the rest of the deadline, which is longer
    where many bytes move.
    """
    store, path = stores.store_of(uri)
    operation = getattr(store, method, None)
    if operation is None:  # a store that is read only
        raise not_writable(uri)
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
        raise not_found(uri) from None
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
    raise StorageRefused(f"cannot {action} {uri}", found=store.describe(error), remedy=remedy) from error


def not_found(uri: str) -> NotFound:
    """The error for an object that is missing."""
    return NotFound(
        f"{uri} is not there", remedy="check the path; if it should exist, run the step that makes it"
    )
