"""A sharding worker's memory and temporary files stay below two shards, wherever the source lies."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import tracemalloc
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster import storage
from stages.data.manifest import load_manifest
from tests.stages.images import shard_folder
from tests.stages.shard.archives import tar_bytes, write_parquet

REPOSITORY = Path(__file__).resolve().parents[3]


def source_of(folder: Path, kind: str) -> Path:
    """48 images of 2 MB; in Parquet a row group (one page, as Hugging Face writes them) is a twelfth of a shard."""
    rng, images = np.random.default_rng(0), []
    for _ in range(48):  # no two equal: Parquet would store them once
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (820, 820, 3), np.uint8)).save(buffer, "PNG", compress_level=0)
        images.append(buffer.getvalue())
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", [(data, None, 0) for data in images], ["c"], group=1)
    path = folder / "a.tar"
    path.write_bytes(tar_bytes((f"c/{i:04d}.png", data) for i, data in enumerate(images)))
    return path


@pytest.mark.parametrize("store", ["local", pytest.param("seaweedfs", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_worker_holds_less_than_two_shards(
    tmp_path: Path, kind: str, store: str, request: pytest.FixtureRequest
) -> None:
    source = str(source_of(tmp_path, kind))
    if store == "seaweedfs":
        root = request.getfixturevalue("seaweedfs_root")
        storage.upload_file(source, f"{root}/{Path(source).name}")
        source = f"{root}/{Path(source).name}"
    # A process of its own, so that nothing else counts.
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.shard.test_memory", source, str(tmp_path / "out")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shards"] == 4 and found["shard_bytes"] > 20e6
    assert (found["arrow"] > 0) == (kind == "parquet")
    # The two peaks need not fall together: their sum is at least what was held at once.
    assert found["python"] + found["arrow"] < 2 * found["shard_bytes"], f"{found}"
    assert found["files"] == 2  # one that is published, and one that is packed meanwhile


def measure(source: str, out: str) -> dict[str, Any]:
    """Peaks, in bytes, of Python's memory (bytes and NumPy) and of Arrow's; of files, their number."""
    shard_folder(source, f"{out}-before", shard_samples=48)  # type: ignore[arg-type]  # imports, clients, connections
    files, move = [0], storage.move_file

    def slow(local: Path, uri: str) -> None:
        deadline = time.monotonic() + 60
        for looks in count(1):  # time for the next shards to pile up, if anything let them
            time.sleep(0.05)
            files[0] = max(files[0], len(list(Path(local).parent.glob("*.tar"))))
            if looks >= 10 and (files[0] > 1 or time.monotonic() > deadline):
                break  # one file beside a shard that is published is sure to come, however slowly
        move(local, uri)

    storage.move_file = slow
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    ref = shard_folder(source, out, shard_samples=12)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    # Arrow writes the index too: columns of 48 rows, which are no part of the source.
    shards = load_manifest(ref.manifest).splits["train"].shards
    return {
        "python": peak, "arrow": pool.max_memory() if source.endswith(".parquet") else 0, "files": files[0],
        "shards": len(shards), "shard_bytes": shards[0].bytes,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
