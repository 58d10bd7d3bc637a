"""Read a shard's images from wherever they lie, in the shard's order.

Local sources are read one image at a time. From an object store, images that lie near each other come in one
request (`plan_runs`), with 16 requests in flight; Parquet files are read by pages. Both of these keep at
most one shard's images in memory, and what is under way adds at most as much again: of a store the requests in
flight, of Parquet a page three times (as stored, decompressed, as an array) and 12 MB of buffers. So it is less than
two shards where those have 20 MB or more and a page (for Hugging Face's files that is a row group) at most a tenth
of that; larger pages need about three times their size.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypedDict

import numpy as np

from cluster import storage
from cluster.errors import DataInvalid
from stages.data.decode import BadImage
from stages.data.files import kept_open
from stages.shard import parquet
from stages.shard.listing import PARQUET, ZIP, local_path

REQUESTS = 16  # an object store answers a range in about 20 ms; 16 in flight keep one core busy
GAP_BYTES = 1 << 18  # read and dropped rather than asked for apart: 20 ms at 100 MB/s would even allow 2 MB
RUN_BYTES = 8 << 20  # of one request
_ZIP_SLACK = 512  # local headers repeat the name and may carry extra fields that the directory lacks


class Samples(TypedDict):
    """The images of one shard as columns, in the shard's order."""

    paths: list[str]  # inside the source, for messages (and to read, where every image is a file)
    keys: list[str]
    container: list[int]  # -1: the image is a file of its own
    offset: list[int]
    size: list[int]
    aux: list[int]  # zip: stored bytes * 2 + deflated
    label: list[int]


class Where(TypedDict):
    """How to reach the images."""

    source: str  # folder that `paths` are relative to
    containers: dict[int, tuple[str, str]]  # number -> (URI, kind)
    max_file_bytes: int


def read_images(samples: Samples, where: Where) -> Iterator[bytes | BadImage]:
    """The bytes of each image in order, or why they could not be had.

    Raises DataInvalid when the source has changed since it was listed.
    """
    kinds = {kind for _, kind in where["containers"].values()}
    if PARQUET in kinds:
        yield from _read_parquet(samples, where)
    elif local_path(where["source"]) is not None:
        yield from _read_local(samples, where)
    else:
        yield from _read_remote(samples, where)


def plan_runs(
    container: list[int], begin: list[int], length: list[int], run_bytes: int = RUN_BYTES
) -> list[list[int]]:
    """Positions grouped into requests: same container, gaps of at most GAP_BYTES, at most `run_bytes` together.

    Sorted by the first position that each serves, so that what is needed first is asked for first.
    """
    runs: list[list[int]] = []
    end = start = 0
    for at in sorted(range(len(begin)), key=lambda i: (container[i], begin[i])):
        last = runs[-1][-1] if runs else -1
        joins = (
            runs
            and container[at] >= 0
            and container[at] == container[last]
            and begin[at] - end <= GAP_BYTES
            and begin[at] + length[at] - start <= run_bytes
        )
        if joins:
            runs[-1].append(at)
            end = max(end, begin[at] + length[at])
        else:
            runs.append([at])
            start, end = begin[at], begin[at] + length[at]
    return sorted(runs, key=min)


def _extent(samples: Samples, where: Where, at: int) -> tuple[int, int]:
    """Offset and length to ask for."""
    container = samples["container"][at]
    if container >= 0 and where["containers"][container][1] == ZIP:
        guess = 30 + len(samples["paths"][at].encode()) + _ZIP_SLACK + (samples["aux"][at] >> 1)
        return samples["offset"][at], guess
    return samples["offset"][at], samples["size"][at]


def _too_large(samples: Samples, where: Where, at: int) -> BadImage | None:
    size = samples["size"][at]
    stored = max(size, samples["aux"][at] >> 1)
    if stored <= where["max_file_bytes"]:
        return None
    return BadImage(f"{size} bytes, more than the cap of {where['max_file_bytes']}")


def _read_local(samples: Samples, where: Where) -> Iterator[bytes | BadImage]:
    containers = where["containers"]
    with kept_open(lambda container: os.open(containers[container][0], os.O_RDONLY)) as files:
        for at, container in enumerate(samples["container"]):
            if bad := _too_large(samples, where, at):
                yield bad
                continue
            if container < 0:
                yield _whole_file(samples, where, at)
                continue
            begin, length = _extent(samples, where, at)
            handle = files(container)
            yield _content(samples, where, at, os.pread(handle, length, begin))


def _whole_file(samples: Samples, where: Where, at: int) -> bytes:
    path = os.path.join(where["source"], samples["paths"][at])  # noqa: PTH118 (a hot loop)
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise _changed(samples, where, at, "no file") from None
    try:
        data = os.read(handle, samples["size"][at] + 1)
    finally:
        os.close(handle)
    if len(data) != samples["size"][at]:
        raise _changed(samples, where, at, f"{len(data)} bytes or more")
    return data


def _read_remote(samples: Samples, where: Where) -> Iterator[bytes | BadImage]:
    bad = {at: reason for at in range(len(samples["size"])) if (reason := _too_large(samples, where, at))}
    asked = [at for at in range(len(samples["size"])) if at not in bad]
    extents = [_extent(samples, where, at) for at in asked]
    run_bytes = max(1 << 20, min(RUN_BYTES, sum(length for _, length in extents) // REQUESTS))
    containers = [samples["container"][at] for at in asked]
    runs = plan_runs(containers, [e[0] for e in extents], [e[1] for e in extents], run_bytes)
    waiting = deque([asked[i] for i in run] for run in runs)
    pending: deque[tuple[list[int], Future[list[bytes | BadImage]]]] = deque()
    ready: dict[int, bytes | BadImage] = dict(bad)
    with ThreadPoolExecutor(REQUESTS) as pool:
        for at in range(len(samples["size"])):
            # Runs are in the order of the first image they hold, so the oldest one is always the one to wait for.
            while at not in ready:
                while waiting and len(pending) < REQUESTS:
                    pending.append((waiting[0], pool.submit(_request, samples, where, waiting.popleft())))
                run, future = pending.popleft()
                ready |= zip(run, future.result(), strict=True)
            yield ready.pop(at)


def _request(samples: Samples, where: Where, run: list[int]) -> list[bytes | BadImage]:
    """One request, cut into the images of `run`."""
    container = samples["container"][run[0]]
    if container < 0:
        uri = storage.join(where["source"], samples["paths"][run[0]])
        return [_content(samples, where, run[0], storage.read_bytes(uri))]
    extents = [_extent(samples, where, at) for at in run]
    begin = extents[0][0]
    end = max(offset + length for offset, length in extents)
    block = memoryview(storage.read_range(where["containers"][container][0], begin, end - begin))
    return [
        _content(samples, where, at, bytes(block[offset - begin : offset - begin + length]))
        for at, (offset, length) in zip(run, extents, strict=True)
    ]


def _content(samples: Samples, where: Where, at: int, block: bytes) -> bytes | BadImage:
    """The image in the bytes that were read for it."""
    container = samples["container"][at]
    if container >= 0 and where["containers"][container][1] == ZIP:
        return _unzip(samples, where, at, block)
    if len(block) != samples["size"][at]:
        raise _changed(samples, where, at, f"{len(block)} bytes")
    return block


def _unzip(samples: Samples, where: Where, at: int, block: bytes) -> bytes | BadImage:
    stored, deflated = samples["aux"][at] >> 1, samples["aux"][at] & 1
    if block[:4] != b"PK\x03\x04" or len(block) < 30:
        return BadImage("no zip entry where the directory says there is one")
    begin = 30 + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
    if begin + stored > len(block):
        uri = where["containers"][samples["container"][at]][0]
        block = storage.read_range(uri, samples["offset"][at], begin + stored)
    data = block[begin : begin + stored]
    if deflated:
        try:
            # The cap on the output is the bomb guard: a member may not grow beyond its stated size.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, samples["size"][at] + 1)
        except zlib.error as error:
            return BadImage(f"zip entry does not inflate: {error}")
    if len(data) != samples["size"][at]:
        return BadImage("zip entry has another size than its directory says")
    stated = int.from_bytes(block[14:18], "little")
    if (
        not block[6] & 8 and zlib.crc32(data) != stated
    ):  # with bit 3 the header came before the checksum was known
        return BadImage("zip entry has another checksum than its header says")
    return data


def _read_parquet(samples: Samples, where: Where) -> Iterator[bytes | BadImage]:
    found: list[bytes | BadImage | None] = [None] * len(samples["size"])
    containers = np.array(samples["container"])
    rows = np.array(samples["offset"])
    for container in np.unique(containers).tolist():
        positions = np.flatnonzero(containers == container)
        for at, data in parquet.read_rows(where["containers"][container][0], rows[positions]):
            if data is not None and len(data) > where["max_file_bytes"]:
                data = None
                found[positions[at]] = BadImage(f"more bytes than the cap of {where['max_file_bytes']}")
            else:
                found[positions[at]] = BadImage("no bytes in this row") if data is None else data
    for at, item in enumerate(found):
        assert item is not None
        found[at] = None  # written images leave memory
        yield item


def _changed(samples: Samples, where: Where, at: int, found: str) -> DataInvalid:
    return DataInvalid(
        f"{samples['paths'][at]} changed while it was read from {where['source']}",
        expected=f"{samples['size'][at]} bytes",
        found=found,
        remedy="leave the source alone while it is sharded, then run again",
    )
