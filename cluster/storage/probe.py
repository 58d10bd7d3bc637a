"""Whether a store keeps the preconditions that everything here rests on."""

from __future__ import annotations

import contextlib
import uuid

from cluster.errors import AlreadyExists, ItpnError, PreflightError
from cluster.storage import calls
from cluster.storage.uris import join

PROBE_DEADLINE_S = 20.0


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
        calls.call(uri, "put", b"first", deadline_s=PROBE_DEADLINE_S)
        with contextlib.suppress(AlreadyExists):
            calls.call(uri, "create", b"second", deadline_s=PROBE_DEADLINE_S)
            ignored.append("If-None-Match")
        _, stale = calls.call(uri, "get", deadline_s=PROBE_DEADLINE_S)
        calls.call(uri, "put", b"third", deadline_s=PROBE_DEADLINE_S)
        if calls.call(uri, "put_if", b"fourth", stale, deadline_s=PROBE_DEADLINE_S):
            ignored.append("If-Match")
    finally:
        with contextlib.suppress(ItpnError):
            calls.call(uri, "delete", deadline_s=2.0)
    if ignored:
        raise PreflightError(
            f"the object store of {root} ignores conditional writes",
            expected="a second exclusive create and a stale replacement are refused (HTTP 412)",
            found=f"{' and '.join(ignored)} accepted and ignored",
            remedy="use a store with conditional writes (AWS S3, SeaweedFS, MinIO, …)",
        )
