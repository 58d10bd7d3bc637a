"""Read a data set again and compare it with its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, NotFound
from stages.artifacts import DatasetRef, parse_artifact
from stages.data.manifest import IndexFile, Shard, content_fingerprint, load_manifest, resolve
from stages.data.rng import permutation

_PIECE_BYTES = 8 << 20


class Difference(NamedTuple):
    """A file that is not what the manifest says."""

    file: str  # name of the shard, or path of the index
    uri: str
    reason: str


class Verification(NamedTuple):
    """What was looked at, and what differs."""

    manifest: str
    shards: int  # of the data set
    read: int  # shards whose every byte was hashed; of the others, the size was compared
    bytes_read: int
    differences: list[Difference]


def verify(
    uri: str,
    *,
    sample: int | None = None,
    seed: int = 0,
    workers: int = 8,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare every index, and all shards (or `sample` of them, chosen by `seed`), with the manifest.

    Args:
        uri: of a manifest, or of the output folder of a finished shard step.
        workers: files read at once; each needs 8 MiB.
        on_file: told (done, total) files as they are finished.

    Raises DataInvalid when there is no data set, or its manifest contradicts itself.
    """
    where = manifest_of(uri)
    manifest = load_manifest(where)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    of_split = {name: split.shards for name, split in manifest.splits.items()}
    if content_fingerprint(manifest.classes, of_split) != manifest.fingerprint:
        raise DataInvalid(
            f"the manifest {where} contradicts itself: its fingerprint is not that of its shards",
            remedy="restore it from a copy, or shard the data again",
        )
    chosen = np.arange(len(shards)) if sample is None else permutation(len(shards), seed)[:sample]
    whole = {shards[i].path for i in chosen.tolist()}
    files: list[Shard | IndexFile] = [split.index for split in manifest.splits.values()]
    files += sorted(shards, key=lambda shard: shard.path not in whole)  # long reads first
    done, read, found = 0, 0, []
    with ThreadPoolExecutor(workers) as pool:  # hashing and reading release the interpreter lock
        work = ((f, resolve(where, manifest, f.path)) for f in files)
        jobs = [pool.submit(_compare, f, at, f.path in whole or isinstance(f, IndexFile)) for f, at in work]
        for file, job in zip(files, jobs, strict=True):
            reason, bytes_ = job.result()
            read += bytes_
            done += 1
            if reason:
                name = file.name if isinstance(file, Shard) else file.path
                found.append(Difference(name, resolve(where, manifest, file.path), reason))
            on_file(done, len(files))
    return Verification(where, len(shards), len(whole), read, sorted(found))


def manifest_of(uri: str) -> str:
    """The manifest that `uri` names, itself or through the record of a finished step, whose sha256 it must have."""
    uri = storage.join(uri)
    if uri.endswith(".json"):
        return uri
    for mark in ("record.json", "artifact.json"):
        if storage.exists(at := storage.join(uri, mark)):
            artifact = parse_artifact(storage.read_json(at)["artifact"])
            if isinstance(artifact, DatasetRef):
                if storage.sha256_bytes(storage.read_bytes(artifact.manifest)) != artifact.sha256:
                    raise DataInvalid(
                        f"the manifest {artifact.manifest} is not the one that {at} names",
                        expected=f"sha256 {artifact.sha256}",
                        remedy="restore it from a copy, or shard the data again",
                    )
                return artifact.manifest
            raise ConfigError(
                f"{uri} is no data set but a {artifact.kind}", remedy="name a shard step's output"
            )
    if storage.exists(at := storage.join(uri, "manifest.json")):
        return at
    raise DataInvalid(
        f"there is no data set at {uri}",
        expected="a manifest.json, or the output folder of a finished shard step",
        remedy="correct the URI, or finish the shard step",
    )


def _compare(file: Shard | IndexFile, uri: str, whole: bool) -> tuple[str, int]:
    """Why the file differs ('' when it does not), and the bytes read."""
    try:
        size = storage.size(uri)
        if size != file.bytes:
            return f"{size} bytes, not {file.bytes}", 0
        if not whole:
            return "", 0
        digest = hashlib.sha256()
        for begin in range(0, size, _PIECE_BYTES):
            digest.update(storage.read_range(uri, begin, min(_PIECE_BYTES, size - begin)))
    except NotFound:
        return "missing", 0
    found = digest.hexdigest()
    return "" if found == file.sha256 else f"sha256 {found[:16]}…, not {file.sha256[:16]}…", size
