"""Memory and time of the shard stage's index on a synthetic listing of 20 million images.

    python bench/shard_index.py                   20 million images in 21,841 class tars; about ten minutes
    python bench/shard_index.py --quick           2 million

Runs what `stages.shard` runs between the listing and the first shard (index, permutation, the job of one shard),
and fails when the process grows by more than `--limit` bytes per image. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.shard.config import ShardConfig
from stages.shard.index import build_index
from stages.shard.listing import TAR, Listing, Unit
from stages.shard.plan import plan_shards, samples_of
from stages.shard.source import Source

CLASSES = 21_841
BYTES = 110_000  # of an image


def listings(images: int) -> Iterator[Listing]:
    """A tar per synset, as stages.shard.source lists ImageNet-21K."""
    for number in range(CLASSES):
        count = images // CLASSES + (number < images % CLASSES)
        wnid = f"n{number:08d}"
        unit = Unit(kind=TAR, uri="", offset=0, size=0, container=number, name=f"{wnid}.tar", lone=False)
        yield Listing(
            unit,
            paths=[f"{wnid}/{wnid}_{i}.JPEG" for i in range(count)],
            offset=array("q", range(512, 512 + count * BYTES, BYTES)),
            size=array("q", [BYTES]) * count,
            aux=array("q", [0]) * count,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000_000)
    parser.add_argument("--quick", action="store_true", help="2 million images")
    parser.add_argument("--limit", type=float, default=150.0, help="bytes of memory per image")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images = 2_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    config = ShardConfig(name="synthetic", source="/")
    index = build_index(listings(arguments.images), config.splits, uri="synthetic")
    indexed_s = time.perf_counter() - began
    source = Source("/", "folder of tar", [], [], config.splits, None)
    planned = plan_shards(index, source, config)
    planned_s = time.perf_counter() - began - indexed_s
    began = time.perf_counter()
    samples = samples_of(index, planned[0])
    job_s = time.perf_counter() - began
    assert len(set(samples["keys"])) == len(samples["keys"]) and len(index.classes) == CLASSES
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    result = {
        "images": arguments.images,
        "shards": len(planned),
        "index_s": round(indexed_s, 1),
        "plan_s": round(planned_s, 1),
        "job_s": round(job_s, 4),
        "peak_rss_bytes": grown,
        "bytes_per_image": round(grown / arguments.images, 1),
    }
    print(json.dumps(result))
    if grown > arguments.limit * arguments.images:
        sys.exit(f"the index took more than {arguments.limit:g} bytes per image")


if __name__ == "__main__":
    main()
