"""Images per second of sharding, beside plain `tar` and webdataset's ShardWriter in a plain loop.

    python bench/shard.py            6,144 JPEGs of ImageNet-like size, 5 rounds; some minutes
    python bench/shard.py --quick    640 JPEGs, 2 rounds; under a minute

All variants read the same ImageFolder (page cache) and write to the same disk, interleaved, medians are
compared. Ours is the whole stage as a Ray cluster runs it: scan, header check of every image, sha256, fsync,
part records, index and manifest; the worker processes are warm, as they are in a cluster after their first
task. Neither tar nor ShardWriter checks, hashes or syncs. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset as wds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.images import write_folder
from cluster.jobs import RayExecutor, Session
from cluster.resources import Resources
from stages.context import StageContext
from stages.shard.config import ShardConfig
from stages.shard.stage import run


def with_tar(source: Path, out: Path) -> None:
    subprocess.run(["tar", "-cf", out / "all.tar", "-C", source, "."], check=True)


def with_shard_writer(source: Path, out: Path, shard_samples: int) -> None:
    classes = {folder.name: label for label, folder in enumerate(sorted((source / "train").iterdir()))}
    with wds.ShardWriter(str(out / "train-%06d.tar"), maxcount=shard_samples, verbose=0) as writer:
        for path in (source / "train").rglob("*.jpg"):
            name = path.parent.name
            writer.write(
                {"__key__": f"{name}/{path.stem}", "jpg": path.read_bytes(), "cls": str(classes[name])}
            )


def with_stage(source: Path, out: Path, shard_samples: int, workers: int) -> None:
    config = ShardConfig(name="bench", source=str(source), shard_samples=shard_samples)
    run(config, {}, StageContext(out=str(out), executor=RayExecutor(), resources=Resources(workers=workers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="640 images, 2 rounds")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    arguments = parser.parse_args()
    count = arguments.images or (640 if arguments.quick else 6144)
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    shard_samples = max(1, count // 12)
    with tempfile.TemporaryDirectory(prefix="itpn-bench-shard-") as scratch:
        source = write_folder(Path(scratch) / "in", count)
        total = sum(path.stat().st_size for path in source.rglob("*.jpg"))
        print(f"{count} JPEGs, {total / 1e6:.0f} MB, {rounds} rounds", flush=True)
        session = Session()
        try:
            with_stage(source, Path(scratch) / "warm", shard_samples, 2)
            shutil.rmtree(Path(scratch) / "warm")
            variants: dict[str, Callable[[Path], None]] = {
                "tar": lambda out: with_tar(source, out),
                "shardwriter": lambda out: with_shard_writer(source, out, shard_samples),
                "one_worker": lambda out: with_stage(source, out, shard_samples, 1),
                "two_workers": lambda out: with_stage(source, out, shard_samples, 2),
            }
            seconds: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(rounds):
                for name, variant in variants.items():
                    out = Path(scratch) / name
                    out.mkdir()
                    began = time.perf_counter()
                    variant(out)
                    seconds[name].append(time.perf_counter() - began)
                    shutil.rmtree(out)
        finally:
            session.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        spread = f"{min(seconds[name]):.2f} … {max(seconds[name]):.2f} s"
        print(f"{name:12s} {count / value:8.0f} images/s {total / value / 1e6:8.0f} MB/s   ({spread})")
    result = {
        "images": count,
        "megabytes": round(total / 1e6),
        **{f"{name}_images_per_s": round(count / value) for name, value in median.items()},
        **{f"{name}_over_shardwriter": round(median["shardwriter"] / median[name], 2) for name in median},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
