"""Shard images of any known layout into WebDataset tars with a manifest and an index.

Scan → index → seeded global permutation → shards. Workers write whole shards; a shard is finished when its
record under `out/parts/` and its tar exist, so a rerun writes only what is missing (and shards that lack an
image which can be read by now), and the same source, seed and
config give byte-identical shards on any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster import storage
from cluster.errors import DataInvalid
from cluster.resources import cpu_count
from stages.artifacts import Artifact, Outcome
from stages.context import Progress, StageContext
from stages.shard.config import ShardConfig
from stages.shard.index import SourceIndex, build_index
from stages.shard.plan import PlannedShard, plan_fingerprint, plan_shards, samples_of
from stages.shard.publish import SHOWN, publish
from stages.shard.read import Where
from stages.shard.source import Source, open_source
from stages.shard.write import ShardJob, Summary, parts_uri, usable_part, write_shards

_TASK_SHARDS = 4  # at most, of one task: a killed worker repeats no more than these


def run(config: ShardConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Write the data set; returns a DatasetRef.

    Raises:
        DataInvalid: the source is missing, refused, or has more broken images than allowed.
        ConfigError: the source is compressed as a whole.
    """
    del inputs  # a source is the user's, not a step's
    source = open_source(config.source, config.splits, config.val_labels)
    index = build_index(source.listings(context), config.splits, uri=source.uri, split_of=source.split_of)
    plan = plan_fingerprint(config, index)
    planned = plan_shards(index, source, config)
    parts = _write_all(config, context, index, planned, source, plan)
    return publish(config, context, index, planned, parts, source, plan)


def _write_all(
    config: ShardConfig,
    context: StageContext,
    index: SourceIndex,
    planned: list[PlannedShard],
    source: Source,
    plan: str,
) -> dict[str, Summary]:
    """Summaries of all shards by name: of those found, and of those written now."""
    total = sum(len(split) for split in index.splits.values())
    kinds = {unit["container"]: unit["kind"] for unit in source.units}
    recorded = {Path(item.uri).stem for item in storage.list_files(parts_uri(context.out, plan))}
    old = [shard for shard in planned if shard.name in recorded]

    def look(shard: PlannedShard) -> Summary | None:
        return usable_part(
            context.out,
            shard.name,
            plan,
            lambda: _job(config, context, index, shard, source, kinds, plan),
        )

    with ThreadPoolExecutor(8) as pool:
        looked = zip(old, pool.map(look, old), strict=True)
        parts = {shard.name: part for shard, part in looked if part is not None}
    names = list(parts)
    done = sum(_images(part) for part in parts.values())
    progress = Progress(context.out, total=total, unit="images", start=done)
    progress.update(done, force=True)
    bad = _Bad(config, total)
    for name in names:
        bad.add(parts[name])
    missing = [shard for shard in planned if shard.name not in parts]
    size = max(1, min(_TASK_SHARDS, len(missing) // (2 * context.resources.workers)))

    def tasks() -> Iterator[list[ShardJob]]:
        for begin in range(0, len(missing), size):
            yield [
                _job(config, context, index, shard, source, kinds, plan)
                for shard in missing[begin : begin + size]
            ]

    # `tasks` is consumed as workers become free, so at most one task per worker holds its list of samples.
    for summaries in context.executor.map(write_shards, tasks(), context.resources):
        for part in summaries:
            parts[part["shard"]["name"]] = part
            done += _images(part)
            bad.add(part)
        progress.update(done)
    return parts


def _job(
    config: ShardConfig,
    context: StageContext,
    index: SourceIndex,
    shard: PlannedShard,
    source: Source,
    kinds: dict[int, str],
    plan: str,
) -> ShardJob:
    samples = samples_of(index, shard)
    if source.moved:
        samples["paths"] = [source.moved.get(path, path) for path in samples["paths"]]
    used = {number for number in samples["container"] if number >= 0}
    return ShardJob(
        plan=plan,
        split=shard.split,
        name=shard.name,
        out=context.out,
        files=context.files,
        verify=config.verify,
        max_pixels=config.max_pixels,
        max_side=config.max_side,
        quality=config.quality,
        hash_beside=context.resources.workers * context.resources.cpus < cpu_count(),
        where=Where(
            source=source.uri,
            containers={number: (source.containers[number], kinds[number]) for number in used},
            max_file_bytes=config.max_file_bytes,
        ),
        samples=samples,
    )


def _images(part: Summary) -> int:
    return part["shard"]["samples"] + len(part["skipped"])


class _Bad:
    """Broken images so far; DataInvalid once they are more than max_bad_fraction of all (of few, that is any)."""

    def __init__(self, config: ShardConfig, total: int) -> None:
        self.config, self.total = config, total
        self.found: list[dict[str, str]] = []

    def add(self, part: Summary) -> None:
        self.found += part["skipped"]
        if not part["skipped"] or len(self.found) <= int(self.config.max_bad_fraction * self.total):
            return
        shown = "\n".join(f"    {item['source']}: {item['reason']}" for item in self.found[:SHOWN])
        raise DataInvalid(
            f"{len(self.found)} images of {self.config.source} are broken:\n{shown}",
            expected=f"at most {self.config.max_bad_fraction:.2%} of {self.total} (max_bad_fraction)",
            found=f"{len(self.found)}" + (f", the first {SHOWN} listed" if len(self.found) > SHOWN else ""),
            remedy="repair or remove them, or raise max_bad_fraction to leave them out",
        )
