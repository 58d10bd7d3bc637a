"""Write shards: read their images, check them, pack them, publish.

Runs in a worker process, on a few shards in a row: while one is packed, the one before it is hashed into
the store by a thread. So at most two shards per worker exist at once, as temporary files; in memory there is
one image (local sources), or at most two shards' worth (stages/shard/read.py).

A shard counts when its part record (`parts/<plan>/<name>.json`, created exclusively) and its tar are there; the
tar lies under the prefix of the attempt that wrote it, so a dead writer's file never mixes with a live one's.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from PIL import Image

from cluster import storage
from cluster.errors import AlreadyExists, NotFound
from stages.data.decode import BadImage, Header, decode, probe
from stages.shard.listing import local_path
from stages.shard.read import Samples, Where, read_images
from stages.shard.ustar import TarWriter

QUALITY = 92  # of images shrunk to max_side


class ShardJob(TypedDict):
    """All that a worker needs to write one shard; picklable."""

    plan: str  # fingerprint of source and config; a part of another plan is not ours
    split: str
    name: str
    out: str
    files: str  # URI prefix of this attempt, below `out`
    verify: str
    max_pixels: int
    max_side: int | None
    quality: int | None
    hash_beside: bool  # the machine has a core to spare for a hashing thread
    where: Where
    samples: Samples


class Summary(TypedDict):
    """What the driver keeps of a finished shard."""

    shard: dict[str, Any]
    skipped: list[dict[str, str]]


def parts_uri(out: str, plan: str) -> str:
    """Where the records of shards lie that were written from one source under one config (`plan`, its sha256).

    A source that was mended, or a limit that was raised, is another plan: its shards are written anew.
    """
    return storage.join(out, "parts", plan[:16])


def part_uri(out: str, name: str, plan: str) -> str:
    """Where the record of a finished shard lies."""
    return storage.join(parts_uri(out, plan), f"{name}.json")


def write_shards(jobs: list[ShardJob]) -> list[Summary]:
    """Write, upload and commit shards one after another; a shard that is finished already is not written again."""
    done: list[Future[Summary]] = []
    # Beside the destination when that is local, so that publishing is a rename and not a copy.
    beside = local_path(jobs[0]["files"])
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".tmp-itpn-shards-", dir=beside) as folder,
        ThreadPoolExecutor(1) as publisher,
    ):
        for job in jobs:
            if len(jobs) > 1 and storage.exists(part_uri(job["out"], job["name"], job["plan"])):
                done.append(publisher.submit(_existing, job))
                continue
            packed = _pack(job, Path(folder) / f".tmp-{job['name']}.tar")
            if done:
                done[-1].result()  # one shard waits for the store, not more
            done.append(publisher.submit(_publish, job, *packed))
        return [future.result() for future in done]


def read_part(out: str, name: str, plan: str) -> dict[str, Any]:
    """The record of a finished shard."""
    return storage.read_json(part_uri(out, name, plan))


def summary(part: dict[str, Any]) -> Summary:
    """A part record without its rows."""
    return Summary(shard=part["shard"], skipped=part["skipped"])


def usable_part(out: str, name: str, plan: str, job: Callable[[], ShardJob]) -> Summary | None:
    """The recorded shard; None, its record removed, when it must be written again (`job` makes what does it).

    That is so when its tar is gone or has another size, or when an image that was left out can be read now:
    a mended image may have the size it had, and content is no part of the plan.
    """
    uri = part_uri(out, name, plan)
    part = storage.read_json(uri)
    try:
        intact = storage.size(storage.join(out, part["shard"]["path"])) == part["shard"]["bytes"]
    except NotFound:
        intact = False
    if intact and not (part["skipped"] and _mended(job(), part["skipped"])):
        return summary(part)
    storage.delete(uri)
    return None


def _mended(job: ShardJob, skipped: list[dict[str, str]]) -> bool:
    """Whether any image that was left out passes the checks now."""
    paths, samples = {item["source"] for item in skipped}, cast("dict[str, list]", job["samples"])
    rows = [at for at, path in enumerate(samples["paths"]) if path in paths]
    chosen: Any = {name: [column[at] for at in rows] for name, column in samples.items()}
    for read in read_images(chosen, job["where"]):
        with contextlib.suppress(BadImage):
            _check(read, job)
            return True
    return False


def _existing(job: ShardJob) -> Summary:
    return summary(read_part(job["out"], job["name"], job["plan"]))


def _pack(job: ShardJob, local: Path) -> tuple[Path, dict[str, list], list[dict[str, str]], int, str]:
    """The shard as a local file; its index rows, what was left out, its size and sha256."""
    samples = job["samples"]
    offsets: list[int] = []
    sizes: list[int] = []
    kept: list[int] = []
    skipped = []
    tar = TarWriter(local, hash_beside=job["hash_beside"])
    try:
        for at, read in enumerate(read_images(samples, job["where"])):
            try:
                data, suffix = _check(read, job)
            except BadImage as bad:
                skipped.append({"split": job["split"], "source": samples["paths"][at], "reason": bad.message})
                continue
            key = samples["keys"][at]
            offsets.append(tar.add_pair(f"{key}.{suffix}", data, f"{key}.cls", b"%d" % samples["label"][at]))
            sizes.append(len(data))
            kept.append(at)
        total, sha256 = tar.close()
    except BaseException:
        tar.abort()
        raise
    rows: dict[str, list] = {
        "offset": offsets,
        "size": sizes,
        "key": [samples["keys"][at] for at in kept],
        "label": [samples["label"][at] for at in kept],
    }
    return local, rows, skipped, total, sha256


def _publish(
    job: ShardJob, local: Path, rows: dict[str, list], skipped: list[dict[str, str]], total: int, sha256: str
) -> Summary:
    uri = storage.join(job["files"], f"{job['name']}.tar")
    path = uri.removeprefix(storage.join(job["out"]) + "/")
    storage.move_file(local, uri)
    shard = {"name": job["name"], "path": path, "samples": len(rows["key"]), "bytes": total, "sha256": sha256}
    part = {"plan": job["plan"], "split": job["split"], "shard": shard, "rows": rows, "skipped": skipped}
    try:
        storage.write_json_exclusive(part_uri(job["out"], job["name"], job["plan"]), part)
    except AlreadyExists:
        return _existing(job)
    return summary(part)


def _check(read: bytes | BadImage, job: ShardJob) -> tuple[bytes, str]:
    """The bytes and the suffix that they call for (`jpg` or `png`); raises BadImage."""
    if isinstance(read, BadImage):
        raise read
    header = probe(read, max_pixels=job["max_pixels"])
    if job["max_side"] is not None and max(header.height, header.width) > job["max_side"]:
        return _shrink(read, header, job["max_side"], job["quality"] or QUALITY), "jpg"
    if job["verify"] == "decode":
        decode(read, header)
    return read, "jpg" if header.kind == "jpeg" else "png"


def _shrink(data: bytes, header: Header, max_side: int, quality: int) -> bytes:
    """The image with its longer side scaled to `max_side`, upright, as an RGB JPEG."""
    factor = max_side / max(header.height, header.width)
    height, width = (max(1, round(side * factor)) for side in (header.height, header.width))
    # libjpeg scales by halves for nothing; twice the target leaves the filter something to do.
    pixels = decode(data, header, min_height=2 * height, min_width=2 * width)
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
