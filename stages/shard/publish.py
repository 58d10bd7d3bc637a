"""Make the data set of the finished shards: one index per split, and the manifest over everything."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import scratch, storage
from cluster.errors import DataInvalid
from stages.artifacts import DatasetRef, FileInfo, Outcome
from stages.context import StageContext
from stages.data.manifest import (
    INDEX_SCHEMA,
    ClassInfo,
    IndexFile,
    Manifest,
    Shard,
    Skipped,
    Split,
    content_fingerprint,
)
from stages.data.manifest import Source as SourceInfo
from stages.shard.config import ShardConfig
from stages.shard.index import SourceIndex
from stages.shard.plan import PlannedShard
from stages.shard.source import Source
from stages.shard.write import Summary, read_part

SHOWN = 10  # broken images named in a note or an error
_READERS = 16  # parts asked for at once


def publish(
    config: ShardConfig,
    context: StageContext,
    index: SourceIndex,
    planned: list[PlannedShard],
    parts: Mapping[str, Summary],
    source: Source,
    plan: str,
) -> Outcome:
    """Write indices and manifest, and name them; the record of the step makes them count."""
    splits: dict[str, Split] = {}
    files = []
    for name in index.splits:
        of_split = [parts[shard.name]["shard"] for shard in planned if shard.split == name]
        shards = [Shard(**shard) for shard in of_split if shard["samples"]]
        if not shards:
            raise DataInvalid(f"no image of split '{name}' is readable", remedy="check the source")
        stored = _write_index(context, name, [shard.name for shard in shards], plan)
        splits[name] = Split(
            samples=sum(shard.samples for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            index=stored,
            shards=shards,
        )
        stored_files: list[Shard | IndexFile] = [*shards, stored]
        files += [FileInfo(path=file.path, bytes=file.bytes, sha256=file.sha256) for file in stored_files]
    skipped = [Skipped(**item) for shard in planned for item in parts[shard.name]["skipped"]]
    classes = [
        ClassInfo(index=i, wnid=wnid, name=source.names.get(wnid, wnid))
        for i, wnid in enumerate(index.classes)
    ]
    manifest = Manifest(
        name=config.name,
        root="../..",  # the manifest lies in out/attempts/<attempt>/
        fingerprint=content_fingerprint(classes, {name: split.shards for name, split in splits.items()}),
        seed=config.seed,
        source=SourceInfo(
            layout=source.layout,
            entries=sum(len(split) for split in index.splits.values()),
            ignored=index.ignored + source.ignored,
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
    notes = [f"left out {item.source}: {item.reason}" for item in skipped[:SHOWN]]
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
        + ([f"… and {len(skipped) - SHOWN} more, see the manifest"] if len(skipped) > SHOWN else []),
    )


def _write_index(context: StageContext, split: str, names: list[str], plan: str) -> IndexFile:
    uri = storage.join(context.files, f"{split}.index.parquet")
    with tempfile.TemporaryDirectory(prefix="index-", dir=scratch.folder()) as folder:
        local = Path(folder) / "index.parquet"
        with pq.ParquetWriter(local, INDEX_SCHEMA, compression="zstd") as writer:
            for shard, columns in enumerate(_rows(context, names, plan)):
                count = len(columns["key"])
                writer.write_table(
                    pa.table({"shard": np.full(count, shard, np.int32), **columns}, schema=INDEX_SCHEMA)
                )
        size, sha256 = storage.upload_file(local, uri)
    return IndexFile(path=_relative(context, uri), bytes=size, sha256=sha256)


def _rows(context: StageContext, names: list[str], plan: str) -> Iterator[dict[str, list]]:
    """The index rows of each shard, from the part records: a few in memory at once, however many there are."""
    with ThreadPoolExecutor(_READERS) as pool:
        for begin in range(0, len(names), _READERS):
            for part in pool.map(
                lambda name: read_part(context.out, name, plan), names[begin : begin + _READERS]
            ):
                yield part["rows"]


def _relative(context: StageContext, uri: str) -> str:
    return uri.removeprefix(storage.join(context.out) + "/")
