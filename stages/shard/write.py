"""Write one shard: read its images by range, check them, pack them, publish.

Runs in a worker process. Memory is one image plus, for sources on an object store, the read-ahead of
`_READERS` images; the shard itself grows in a local temporary file. A shard counts when its part record
(`parts/<name>.json`, created exclusively) is there; the tar lies under the prefix of the attempt that
wrote it, so a dead writer's file never mixes with a live one's.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, TypedDict

from cluster import storage
from cluster.errors import AlreadyExists, DataInvalid
from stages.data.decode import BadImage, decode, probe
from stages.shard.scan import FILE, ZIP, local_path
from stages.shard.ustar import TarWriter

_READERS = 16  # an object store answers a range in about 20 ms; 16 in flight keep one core busy
_ZIP_SLACK = 512  # local headers repeat the name and may carry extra fields that the directory lacks


class Sample(TypedDict):
    """One image to pack."""

    path: str
    key: str
    offset: int
    size: int
    stored: int
    deflated: bool
    label: int


class ShardJob(TypedDict):
    """All that a worker needs to write one shard; picklable."""

    plan: str  # fingerprint of source and config; a part of another plan is not ours
    split: str
    name: str
    source: str
    layout: str
    out: str
    files: str  # URI prefix of this attempt, below `out`
    verify: str
    max_file_bytes: int
    max_pixels: int
    samples: list[Sample]


def part_uri(out: str, name: str) -> str:
    """Where the record of a finished shard lies."""
    return storage.join(out, "parts", f"{name}.json")


def write_shard(job: ShardJob) -> dict[str, Any]:
    """Write, upload and commit one shard; returns its part record (another writer's, if that came first)."""
    rows: dict[str, list] = {"offset": [], "size": [], "key": [], "label": []}
    skipped = []
    with tempfile.TemporaryDirectory(prefix="itpn-shard-") as folder:
        local = Path(folder) / f"{job['name']}.tar"
        tar = TarWriter(local)
        try:
            for sample, read in _read(job):
                try:
                    data, suffix = _check(read, job)
                except BadImage as bad:
                    skipped.append({"split": job["split"], "source": sample["path"], "reason": bad.message})
                    continue
                rows["offset"].append(tar.add(f"{sample['key']}.{suffix}", data))
                rows["size"].append(len(data))
                rows["key"].append(sample["key"])
                rows["label"].append(sample["label"])
                tar.add(f"{sample['key']}.cls", str(sample["label"]).encode())
        finally:
            total, sha256 = tar.close()
        uri = storage.join(job["files"], f"{job['name']}.tar")
        path = uri.removeprefix(storage.join(job["out"]) + "/")
        storage.upload_file(local, uri)
    shard = {"name": job["name"], "path": path, "samples": len(rows["key"]), "bytes": total, "sha256": sha256}
    part = {"plan": job["plan"], "split": job["split"], "shard": shard, "rows": rows, "skipped": skipped}
    try:
        storage.write_json_exclusive(part_uri(job["out"], job["name"]), part)
    except AlreadyExists:
        return read_part(job["out"], job["name"], job["plan"])
    return part


def read_part(out: str, name: str, plan: str) -> dict[str, Any]:
    """The record of a finished shard; raises DataInvalid when it belongs to another source or config."""
    part = storage.read_json(part_uri(out, name))
    if part["plan"] != plan:
        raise DataInvalid(
            f"{part_uri(out, name)} was written from another source or config than this run's",
            expected=f"plan {plan[:16]}",
            found=f"plan {part['plan'][:16]}",
            remedy="the source changed while the data set was being written: give it a new name or version",
        )
    return part


def _check(read: bytes | BadImage, job: ShardJob) -> tuple[bytes, str]:
    """The bytes and the suffix that they call for (`jpg` or `png`); raises BadImage."""
    if isinstance(read, BadImage):
        raise read
    header = probe(read, max_bytes=job["max_file_bytes"], max_pixels=job["max_pixels"])
    if job["verify"] == "decode":
        decode(read, header)
    return read, "jpg" if header.kind == "jpeg" else "png"


def _read(job: ShardJob) -> Iterator[tuple[Sample, bytes | BadImage]]:
    """The bytes of each sample in order, or why they could not be had."""
    local = local_path(job["source"])
    if local is not None:
        with contextlib.ExitStack() as stack:
            handle = None if job["layout"] == FILE else stack.enter_context(local.open("rb", buffering=0))
            for sample in job["samples"]:
                yield sample, _fetch(job, sample, handle)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[tuple[Sample, Future]] = deque()
        for sample in job["samples"]:
            ahead.append((sample, pool.submit(_fetch, job, sample, None)))
            if len(ahead) == _READERS:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()


def _fetch(job: ShardJob, sample: Sample, handle: FileIO | None) -> bytes | BadImage:
    if sample["size"] > job["max_file_bytes"]:
        return BadImage(f"{sample['size']} bytes, more than the cap of {job['max_file_bytes']}")
    if job["layout"] == FILE:
        data = storage.read_bytes(storage.join(job["source"], sample["path"]))
    elif job["layout"] == ZIP:
        return _unzip(job["source"], sample, handle)
    else:
        data = _range(job["source"], sample["offset"], sample["size"], handle)
    if len(data) != sample["size"]:
        raise DataInvalid(
            f"{sample['path']} changed while it was read from {job['source']}",
            expected=f"{sample['size']} bytes",
            found=f"{len(data)} bytes",
            remedy="leave the source alone while it is sharded, then run again",
        )
    return data


def _unzip(uri: str, sample: Sample, handle: FileIO | None) -> bytes | BadImage:
    guess = 30 + len(sample["path"].encode()) + _ZIP_SLACK + sample["stored"]
    block = _range(uri, sample["offset"], guess, handle)
    if block[:4] != b"PK\x03\x04" or len(block) < 30:
        return BadImage("no zip entry where the directory says there is one")
    begin = 30 + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
    if begin + sample["stored"] > len(block):
        block = _range(uri, sample["offset"], begin + sample["stored"], handle)
    data = block[begin : begin + sample["stored"]]
    if sample["deflated"]:
        try:
            # The cap on the output is the bomb guard: a member may not grow beyond its stated size.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, sample["size"] + 1)
        except zlib.error as error:
            return BadImage(f"zip entry does not inflate: {error}")
    return (
        data
        if len(data) == sample["size"]
        else BadImage("zip entry has another size than its directory says")
    )


def _range(uri: str, offset: int, length: int, handle: FileIO | None) -> bytes:
    if handle is None:
        return storage.read_range(uri, offset, length)
    return os.pread(handle.fileno(), length, offset)
