"""Create, replace and delete objects."""

from __future__ import annotations

from cluster.errors import AlreadyExists, NotFound
from cluster.storage import calls
from cluster.storage.reading import read_bytes


def write_exclusive(uri: str, data: bytes) -> None:
    """Create the object; durable when it returns.

    When the name is taken by these very bytes it succeeds: a retried request cannot know whether its
    first try arrived. Writers that compete therefore put something of their own into `data`.

    Raises:
        AlreadyExists: when other content has the name.
    """
    try:
        calls.call(uri, "create", data, transfer_bytes=len(data))
    except AlreadyExists:
        try:
            if read_bytes(uri) == data:
                return
        except NotFound:
            pass  # deleted since
        raise


def overwrite(uri: str, data: bytes, *, deadline_s: float | None = None) -> None:
    """Write the object, over what is there; durable when it returns."""
    calls.call(uri, "put", data, transfer_bytes=len(data), deadline_s=deadline_s)


def replace_if(uri: str, data: bytes, version: str) -> bool:
    """Write the object if it still has `version` (of `read_versioned`); False when it changed or is gone.

    Equal contents are equal versions: where going back and forth matters, put a counter or an id into `data`.
    """
    if calls.call(uri, "put_if", data, version, transfer_bytes=len(data)):
        return True
    try:
        return read_bytes(uri) == data  # refused, but by our own first try: its answer was lost
    except NotFound:
        return False


def delete(uri: str) -> None:
    """Remove the object; no error when there is none."""
    calls.call(uri, "delete")


def delete_tree(uri_prefix: str) -> None:
    """Remove every object below the prefix; no error when there is none."""
    calls.call(uri_prefix, "delete_tree")
