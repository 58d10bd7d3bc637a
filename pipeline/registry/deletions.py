"""Which checkpoints' files were deleted, and the protocol by which a deletion never meets a use.

    {root}/registry/deleted/<key>.json       one object per checkpoint that gc ever meant to delete: the decision
    {root}/registry/pins/<key>/<id>.json     somebody is about to point an alias at the checkpoint

The decision is moved by compare-and-swap only, each time with a new id:

    (none) | spared  -> marked     gc means to delete the checkpoint
    marked           -> deleted    gc looked at every reference again, after the mark, and found none
    marked           -> spared     gc found one; or somebody who is about to use the checkpoint objects (`claim`)

Whoever uses a checkpoint writes its reference first (a pin, or the plan of a step) and claims it then. Files go
only after `deleted`, which is final. docs/decisions/0007 has the argument why nothing referenced is ever deleted.
"""

from __future__ import annotations

import contextlib
import getpass
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.errors import AlreadyExists, ItpnError, NotFound
from pipeline.registry.events import DeletionRow, parse
from pipeline.registry.store import Registry
from pipeline.version import code_version, host
from stages.artifacts import CheckpointRef

SCHEMA = 1
PIN_S = 7 * 86400.0  # a pin this old was left by a process that died; a promotion takes minutes at most


class Deleted(NotFound):
    """The files of a checkpoint were deleted by retention; its record and its results are still there."""


class Deletion(BaseModel):
    """Where the decision about one checkpoint's files stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    state: Literal["marked", "deleted", "spared"]
    id: str  # new with every change: equal contents would be equal versions
    run: str
    step: str
    checkpoint: str
    checkpoint_sha256: str
    bytes: int
    why: str
    code_version: str
    by: str
    host: str
    at: str

    @property
    def event(self) -> DeletionRow:
        """What the registry says about it for ever; the same event however often it is made."""
        return DeletionRow(
            run=self.run,
            step=self.step,
            code_version=self.code_version,
            created_at=self.at,
            checkpoint=self.checkpoint,
            checkpoint_sha256=self.checkpoint_sha256,
            bytes=self.bytes,
            why=self.why,
            by=self.by,
            host=self.host,
        )


class Mark:
    """A decision in state `marked` that this process wrote, and the version of its object."""

    def __init__(self, uri: str, deletion: Deletion, version: str) -> None:
        self.uri, self.deletion, self.version = uri, deletion, version


class Deletions:
    """The decisions of one registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def all(self) -> dict[str, Deletion]:
        """Every decision, by the URI of its checkpoint."""
        uris = self._registry.ids("deleted").values()
        with ThreadPoolExecutor(16) as pool:
            found: list[Deletion] = list(pool.map(lambda uri: parse(uri, Deletion), uris))
        return {deletion.checkpoint: deletion for deletion in found}

    def done(self) -> dict[str, Deletion]:
        """The checkpoints whose files are gone (or are going), by URI."""
        return {uri: deletion for uri, deletion in self.all().items() if deletion.state == "deleted"}

    def refuse_deleted(self, checkpoint: str) -> None:
        """Raise Deleted when the checkpoint's files are gone."""
        found = self._read(checkpoint)[0]
        if found is not None and found.state == "deleted":
            raise _deleted(found)

    # What gc does

    def mark(self, run: str, step: str, checkpoint: CheckpointRef, why: str) -> Mark | None:
        """Tell everybody that the checkpoint is about to be deleted; None when somebody else just changed that."""
        mine = Deletion(
            state="marked",
            run=run,
            step=step,
            checkpoint=checkpoint.uri,
            checkpoint_sha256=checkpoint.sha256,
            bytes=checkpoint.bytes,
            why=why,
            code_version=code_version(),
            **_signature(),
        )
        found, version = self._read(checkpoint.uri)
        uri = self._uri(checkpoint.uri)
        if found is None:
            try:
                storage.write_exclusive(uri, _bytes(mine))
            except AlreadyExists:
                return None
        elif found.state == "deleted" or not storage.replace_if(uri, _bytes(mine), version):
            return None
        now, version = self._read(checkpoint.uri)
        return Mark(uri, mine, version) if now == mine else None

    def commit(self, mark: Mark) -> Deletion | None:
        """Decide that the files go; None when somebody objected since the mark."""
        decided = mark.deletion.model_copy(update={"state": "deleted", **_signature()})
        return decided if storage.replace_if(mark.uri, _bytes(decided), mark.version) else None

    def spare(self, mark: Mark, why: str) -> None:
        """Withdraw a mark."""
        spared = mark.deletion.model_copy(update={"state": "spared", "why": why, **_signature()})
        storage.replace_if(mark.uri, _bytes(spared), mark.version)  # refused: somebody spared it already

    def pins(self, now: float | None = None) -> tuple[set[str], list[str]]:
        """Keys of the checkpoints (see `key`) that are pinned, and URIs of pins that are too old to count.

        `now` is the store's clock in seconds since the epoch; None takes the newest write that it knows of.
        """
        prefix = storage.join(self._registry.uri, "pins")
        items = storage.list_files(prefix)
        written = [item.mtime for item in storage.list_files(storage.join(self._registry.uri, "deleted"))]
        latest = now if now is not None else max([*written, *(item.mtime for item in items)], default=0.0)
        fresh = {item.uri.split("/")[-2] for item in items if latest - item.mtime < PIN_S}
        return fresh, [item.uri for item in items if latest - item.mtime >= PIN_S]

    # What everybody does who uses a checkpoint

    def claim(self, checkpoint: str, why: str) -> None:
        """Object to a deletion that is being considered. Call it after the reference is written, before any use.

        Raises Deleted when it has been decided.
        """
        while True:
            found, version = self._read(checkpoint)
            if found is None or found.state == "spared":
                return
            if found.state == "deleted":
                raise _deleted(found)
            spared = found.model_copy(update={"state": "spared", "why": why, **_signature()})
            if storage.replace_if(self._uri(checkpoint), _bytes(spared), version):
                return

    @contextlib.contextmanager
    def pinned(self, checkpoint: str, why: str) -> Iterator[None]:
        """Hold a reference to the checkpoint for the time of the block; raises Deleted when it is too late."""
        pin = storage.join(self._registry.uri, "pins", key(checkpoint), f"{uuid.uuid4().hex}.json")
        storage.write_json_exclusive(pin, {"checkpoint": checkpoint, "why": why, **_signature()})
        try:
            self.claim(checkpoint, why)
            yield
        finally:
            with contextlib.suppress(ItpnError):
                storage.delete(pin)

    def _read(self, checkpoint: str) -> tuple[Deletion | None, str]:
        try:
            data, version = storage.read_versioned(self._uri(checkpoint))
        except NotFound:
            return None, ""
        return Deletion.model_validate_json(data), version

    def _uri(self, checkpoint: str) -> str:
        return storage.join(self._registry.uri, "deleted", f"{key(checkpoint)}.json")


def key(checkpoint: str) -> str:
    """The name under which decisions and pins of a checkpoint's URI lie; an attempt's id makes the URI unique."""
    return storage.sha256_bytes(checkpoint.encode())[:32]


def _signature() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"id": uuid.uuid4().hex, "by": user, "host": host(), "at": at}


def _bytes(deletion: Deletion) -> bytes:
    return storage.canonical_json(deletion.model_dump(mode="json"))


def _deleted(found: Deletion) -> Deleted:
    return Deleted(
        f"the files of {found.step} were deleted",
        expected=found.checkpoint,
        found=f"deleted on {found.at[:19]} by {found.by}@{found.host}: {found.why}",
        remedy="choose another checkpoint, or make it anew under another version (--set version=<new name>)",
    )
