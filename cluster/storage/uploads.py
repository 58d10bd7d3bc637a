"""Uploads that were begun and are not finished."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.storage import calls
from cluster.storage.uris import scheme


@dataclass(frozen=True)
class Upload:
    """An upload that was begun and is not finished: its parts take space and are in no listing of objects."""

    uri: str
    id: str
    bytes: int
    began: float  # seconds since the epoch


def list_uploads(uri_prefix: str) -> list[Upload]:
    """The unfinished uploads below the prefix, sorted by URI: multipart ones on S3, temporary files locally.

    Raises StorageRefused where the store cannot list them, or not to this user.
    """
    front = scheme(uri_prefix)
    found = [Upload(front + path, *facts) for path, *facts in calls.call(uri_prefix, "uploads")]
    return sorted(found, key=lambda upload: (upload.uri, upload.id))


def abort_upload(upload: Upload) -> None:
    """Drop an unfinished upload and what it has stored; its writer, if any, fails. No error when it is gone."""
    calls.call(upload.uri, "abort_upload", upload.id)
