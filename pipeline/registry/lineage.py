"""Where a checkpoint comes from, back to the data, and whether its bytes are still its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, ItpnError, NotFound
from pipeline.record import Record
from pipeline.registry.aliases import Aliases
from pipeline.registry.deletions import Deletions
from pipeline.registry.events import CheckpointRow
from pipeline.registry.store import Registry
from stages.artifacts import CheckpointRef, DatasetRef
from stages.config import nearest


def read_record(root: str, step: str) -> Record:
    """The record of a finished step by its id; raises NotFound, or DataInvalid when it is none."""
    uri = storage.join(root, step, "record.json")
    try:
        return Record.model_validate(storage.read_json(uri))
    except ValueError as error:
        raise DataInvalid(
            f"the record {uri} cannot be read",
            found=str(error).splitlines()[0],
            remedy="it was written by another version, or is damaged: restore it",
        ) from None


def find(registry: Registry, name: str) -> CheckpointRow:
    """The checkpoint that `name` means: an alias, a step (`finetune/demo-a/v1`), or the start of a sha256.

    Raises ConfigError when it means none, or several.
    """
    rows = registry.checkpoints()
    alias = Aliases(registry).all().get(name)
    if alias:
        wanted = (alias.current.step, alias.current.checkpoint_sha256)
        hits = [r for r in rows if (r.step, r.checkpoint.sha256) == wanted]
    else:
        hits = [r for r in rows if name == r.step]
        if not hits and len(name) >= 6:
            hits = [r for r in rows if r.checkpoint.sha256.startswith(name)]
    if not hits:
        raise ConfigError(
            f"no checkpoint is called '{name}'",
            expected="an alias, a step, or at least 6 digits of a sha256",
            remedy=nearest(name, [r.step for r in rows]),
        )
    if len({(r.step, r.checkpoint.sha256) for r in hits}) > 1:
        raise ConfigError(f"'{name}' is not unique", found=", ".join(sorted({r.step for r in hits})))
    return hits[-1]


def lineage(root: str, step: str) -> dict[str, Any]:
    """A finished step and, below `inputs`, everything it was made from, JSON-ready."""
    try:
        record = read_record(root, step)
    except NotFound:
        return {"step": step, "missing": True, "inputs": {}}
    node: dict[str, Any] = {
        "step": step,
        "fingerprint": record.fingerprint,
        "code_version": record.code_version,
        "finished_at": record.finished_at,
        "host": record.host,
        "wall_s": record.wall_s,
        "gpu_seconds": record.gpu_seconds,
        "metrics": record.metrics,
        "config": record.config,
    }
    artifact = record.artifact
    if isinstance(artifact, DatasetRef):
        node["dataset"] = artifact.model_dump(mode="json")
    if isinstance(artifact, CheckpointRef):
        node["checkpoint"] = artifact.model_dump(mode="json")
    node["inputs"] = {name: lineage(root, needed.step) for name, needed in sorted(record.inputs.items())}
    return node


def verify(registry: Registry, rows: Sequence[CheckpointRow]) -> list[dict[str, Any]]:
    """Download and re-hash every file of these checkpoints' records; one finding per file.

    What retention deleted is no damage: such a checkpoint has one finding, with `deleted` set.
    """
    findings: list[dict[str, Any]] = []
    gone = Deletions(registry).done()
    for row in rows:
        if deletion := gone.get(row.checkpoint.uri):
            facts = {"step": row.step, "path": "", "ok": True, "deleted": True}
            findings.append({**facts, "found": f"deleted on {deletion.at[:19]}: {deletion.why}"})
            continue
        try:
            record = read_record(registry.root, row.step)
        except ItpnError as error:
            findings.append({"step": row.step, "path": "record.json", "ok": False, "found": error.message})
            continue
        if row.checkpoint.sha256 not in {info.sha256 for info in record.files}:
            # The event is immutable; the record is a file beside the weights.
            found = f"it names no file with the sha256 of the registry, {row.checkpoint.sha256[:16]}…"
            findings.append({"step": row.step, "path": "record.json", "ok": False, "found": found})
        for info in record.files:
            uri = storage.join(registry.root, row.step, info.path)
            found = _damage(uri, info.bytes, info.sha256)
            findings.append({"step": row.step, "path": info.path, "ok": not found, "found": found})
    return findings


def _damage(uri: str, size: int, sha256: str) -> str:
    """What is wrong with the object; empty when nothing is."""

    digest, read = hashlib.sha256(), 0
    try:
        with storage.open_read(uri) as file:
            while block := file.read(8 << 20):
                digest.update(block)
                read += len(block)
    except NotFound:
        return "it is not there"
    if read != size:
        return f"{read} bytes instead of {size}"
    return "" if digest.hexdigest() == sha256 else f"its sha256 is {digest.hexdigest()}"
