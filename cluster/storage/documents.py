"""JSON in storage: records, which are created once, and telemetry, which only informs."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from cluster.errors import DataInvalid
from cluster.hashing import canonical_json, sha256_bytes
from cluster.storage import calls
from cluster.storage.reading import read_bytes
from cluster.storage.writing import write_exclusive

log = logging.getLogger(__name__)

TELEMETRY_DEADLINE_S = 5.0
TELEMETRY_PAUSE_S = 30.0

_telemetry_pause_ends = 0.0


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
        calls.call(uri, "put", data, False, deadline_s=TELEMETRY_DEADLINE_S)
    except Exception as error:
        log.debug("telemetry was not written: %s", error)
        if time.monotonic() - began > TELEMETRY_DEADLINE_S / 2:
            _telemetry_pause_ends = time.monotonic() + TELEMETRY_PAUSE_S
