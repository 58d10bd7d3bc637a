"""Shard a folder tree, tar or zip of images into WebDataset tars with a manifest and an index.

Scan → index → seeded global permutation → shards. Workers write whole shards; a shard is finished when its
record under `out/parts/` exists, so a rerun writes only what is missing, and the same source, seed and
config give byte-identical shards on any number of workers.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import DataInvalid
from stages.artifacts import Artifact, DatasetRef, FileInfo, Outcome
from stages.context import Progress, StageContext
from stages.data.manifest import (
    INDEX_SCHEMA,
    ClassInfo,
    IndexFile,
    Manifest,
    Shard,
    Skipped,
    Source,
    Split,
    content_fingerprint,
)
from stages.data.rng import Purpose, permutation
from stages.shard.config import ShardConfig
from stages.shard.index import SourceIndex, SplitIndex, build_index
from stages.shard.scan import layout_of, scan
from stages.shard.ustar import fits
from stages.shard.write import Sample, ShardJob, read_part, write_shard

_SHOWN = 10  # broken images named in an error
_TAR_OVERHEAD = 2048  # headers and padding of an image and its label, on average


@dataclass(frozen=True)
class _Planned:
    split: str
    name: str
    rows: np.ndarray  # of the split's index


def run(config: ShardConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Write the data set; returns a DatasetRef.

    Raises:
        DataInvalid: the source is missing, refused, or has more broken images than allowed.
        ConfigError: the source is compressed as a whole.
    """
    del inputs  # a source is the user's, not a step's
    source = storage.join(config.source)
    layout = layout_of(source)
    index = build_index(scan(source, layout), config.splits, uri=source)
    plan = _plan_fingerprint(config, index)
    planned = [shard for split in index.splits for shard in _assign(split, index.splits[split], config)]
    parts = _write_all(config, context, index, planned, source, layout, plan)
    return _publish(config, context, index, planned, parts, layout)


def _assign(split: str, index: SplitIndex, config: ShardConfig) -> list[_Planned]:
    """Cut the split's permuted samples into shards of nearly equal count (or of bounded bytes)."""
    tag = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "little")
    order = permutation(len(index), config.seed, int(Purpose.SHARD_ASSIGNMENT), tag)
    if config.shard_bytes is None:
        pieces = np.array_split(order, -(-len(order) // config.shard_samples))
    else:
        ends = np.cumsum(index.size[order] + _TAR_OVERHEAD)
        pieces = np.array_split(
            order, np.searchsorted(ends, np.arange(config.shard_bytes, ends[-1], config.shard_bytes))
        )
        pieces = [piece for piece in pieces if len(piece)]
    return [_Planned(split, f"{split}-{number:06d}", piece) for number, piece in enumerate(pieces)]


def _write_all(
    config: ShardConfig,
    context: StageContext,
    index: SourceIndex,
    planned: list[_Planned],
    source: str,
    layout: str,
    plan: str,
) -> dict[str, dict[str, Any]]:
    """Part records of all shards by name: those found, and those written now."""
    total = sum(len(split) for split in index.splits.values())
    found = {Path(item.uri).stem for item in storage.list_files(storage.join(context.out, "parts"))}
    names = [shard.name for shard in planned if shard.name in found]
    with ThreadPoolExecutor(8) as pool:
        parts = dict(
            zip(names, pool.map(lambda name: read_part(context.out, name, plan), names), strict=True)
        )
    done = sum(_images(part) for part in parts.values())
    progress = Progress(context.out, total=total, unit="images", start=done)
    progress.update(done, force=True)
    _limit_bad(config, parts, total)

    def jobs() -> Iterator[ShardJob]:
        for shard in planned:
            if shard.name not in parts:
                yield ShardJob(
                    plan=plan,
                    split=shard.split,
                    name=shard.name,
                    source=source,
                    layout=layout,
                    out=context.out,
                    files=context.files,
                    verify=config.verify,
                    max_file_bytes=config.max_file_bytes,
                    max_pixels=config.max_pixels,
                    samples=_samples(index.splits[shard.split], shard.rows),
                )

    # `jobs` is consumed as workers become free, so at most one job per worker holds its list of samples;
    # the names that are missing are fixed before the first result comes back.
    written = {}
    for part in context.executor.map(write_shard, jobs(), context.resources):
        written[part["shard"]["name"]] = part
        done += _images(part)
        _limit_bad(config, parts | written, total)
        progress.update(done)
    return parts | written


def _samples(index: SplitIndex, rows: np.ndarray) -> list[Sample]:
    paths, keys = (column.take(pa.array(rows)).to_pylist() for column in (index.paths, index.keys))
    return [
        Sample(
            path=path,
            # A name too long for ustar is replaced by its hash; the label and the order stay.
            key=key if fits(f"{key}.jpg") else hashlib.sha256(key.encode()).hexdigest()[:32],
            offset=int(index.offset[row]),
            size=int(index.size[row]),
            stored=int(index.stored[row]),
            deflated=bool(index.deflated[row]),
            label=int(index.label[row]),
        )
        for path, key, row in zip(paths, keys, rows, strict=True)
    ]


def _images(part: dict[str, Any]) -> int:
    return part["shard"]["samples"] + len(part["skipped"])


def _limit_bad(config: ShardConfig, parts: Mapping[str, dict[str, Any]], total: int) -> None:
    """DataInvalid once more than max_bad_fraction of all images are broken; of few images that is any."""
    bad = [item for name in sorted(parts) for item in parts[name]["skipped"]]
    if len(bad) <= int(config.max_bad_fraction * total):
        return
    shown = "\n".join(f"    {item['source']}: {item['reason']}" for item in bad[:_SHOWN])
    raise DataInvalid(
        f"{len(bad)} images of {config.source} are broken:\n{shown}",
        expected=f"at most {config.max_bad_fraction:.2%} of {total} (max_bad_fraction)",
        found=f"{len(bad)}" + (f", the first {_SHOWN} listed" if len(bad) > _SHOWN else ""),
        remedy="repair or remove them, or raise max_bad_fraction to leave them out",
    )


def _publish(
    config: ShardConfig,
    context: StageContext,
    index: SourceIndex,
    planned: list[_Planned],
    parts: dict[str, dict[str, Any]],
    layout: str,
) -> Outcome:
    splits: dict[str, Split] = {}
    files = []
    for name in index.splits:
        of_split = [parts[shard.name] for shard in planned if shard.split == name]
        shards = [Shard(**part["shard"]) for part in of_split if part["shard"]["samples"]]
        if not shards:
            raise DataInvalid(f"no image of split '{name}' is readable", remedy="check the source")
        stored = _write_index(context, name, [part["rows"] for part in of_split if part["shard"]["samples"]])
        splits[name] = Split(
            samples=sum(shard.samples for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            index=stored,
            shards=shards,
        )
        stored_files: list[Shard | IndexFile] = [*shards, stored]
        files += [FileInfo(path=file.path, bytes=file.bytes, sha256=file.sha256) for file in stored_files]
    skipped = [Skipped(**item) for shard in planned for item in parts[shard.name]["skipped"]]
    classes = [ClassInfo(index=i, wnid=wnid, name=wnid) for i, wnid in enumerate(index.classes)]
    manifest = Manifest(
        name=config.name,
        root="../..",  # the manifest lies in out/attempts/<attempt>/
        fingerprint=content_fingerprint(classes, {name: split.shards for name, split in splits.items()}),
        seed=config.seed,
        source=Source(
            layout=layout,
            entries=sum(len(split) for split in index.splits.values()),
            ignored=index.ignored,
            fingerprint=index.fingerprint,
        ),
        classes=classes,
        splits=splits,
        skipped=skipped,
    )
    uri = storage.join(context.files, "manifest.json")
    content = manifest.model_dump(mode="json")
    sha256 = storage.write_json_exclusive(uri, content)
    size = len(storage.canonical_json(content))
    files.append(FileInfo(path=_relative(context, uri), bytes=size, sha256=sha256))
    samples = {name: split.samples for name, split in splits.items()}
    notes = [f"left out {item.source}: {item.reason}" for item in skipped[:_SHOWN]]
    return Outcome(
        artifact=DatasetRef(
            name=config.name,
            manifest=uri,
            sha256=sha256,
            fingerprint=manifest.fingerprint,
            splits=samples,
            num_classes=len(classes),
        ),
        files=files,
        metrics={
            "samples": float(sum(samples.values())),
            "skipped": float(len(skipped)),
            "classes": float(len(classes)),
            "shards": float(sum(len(split.shards) for split in splits.values())),
            "bytes": float(sum(split.bytes for split in splits.values())),
        },
        notes=notes
        + ([f"… and {len(skipped) - _SHOWN} more, see the manifest"] if len(skipped) > _SHOWN else []),
    )


def _write_index(context: StageContext, split: str, rows: list[dict[str, list]]) -> IndexFile:
    uri = storage.join(context.files, f"{split}.index.parquet")
    with tempfile.TemporaryDirectory(prefix="itpn-index-") as folder:
        local = Path(folder) / "index.parquet"
        with pq.ParquetWriter(local, INDEX_SCHEMA, compression="zstd") as writer:
            for shard, columns in enumerate(rows):
                count = len(columns["key"])
                writer.write_table(
                    pa.table({"shard": np.full(count, shard, np.int32), **columns}, schema=INDEX_SCHEMA)
                )
        size, sha256 = storage.upload_file(local, uri)
    return IndexFile(path=_relative(context, uri), bytes=size, sha256=sha256)


def _relative(context: StageContext, uri: str) -> str:
    return uri.removeprefix(storage.join(context.out) + "/")


def _plan_fingerprint(config: ShardConfig, index: SourceIndex) -> str:
    return hashlib.sha256(
        storage.canonical_json({"config": config.identity(), "source": index.fingerprint})
    ).hexdigest()
