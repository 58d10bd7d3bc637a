"""Reading speed per core: this project's feed beside webdataset + Pillow, and a bare loop without a loader.

    python bench/loader.py [--quick] [--images N] [--rounds R]

All three take the pre-training view (random-resized crop of scale 0.2 to 1, 224 pixels, bicubic, uint8)
from the same local shards, in turns, in one process with one torch thread. Speed per core is images per
second of CPU time (of all threads), which a busy machine disturbs less than wall time; the median of the
rounds counts. The last line is JSON. A fourth loop is for information: webdataset + Pillow as most training scripts
have it, whose loader also converts to float and normalises (here the device does that).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset as wds
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from images import write_folder

from cluster.resources import Resources
from stages.artifacts import DatasetRef
from stages.context import StageContext
from stages.data import region
from stages.data.dataset import ShardDataset
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.view import TrainView
from stages.shard.config import ShardConfig
from stages.shard.stage import run

BATCH = 64
VIEW = TrainView(size=224, min_scale=0.2)
MEAN, STD = (torch.tensor(three)[:, None, None] for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def pillow_view(image: Image.Image) -> np.ndarray:
    """torchvision's RandomResizedCrop(224, (0.2, 1), BICUBIC) on a PIL image."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    cropped = image.crop((left, top, left + w, top + h))
    return np.asarray(cropped.resize((224, 224), Image.Resampling.BICUBIC))


def normalised_view(image: Image.Image) -> np.ndarray:
    """`pillow_view`, then torchvision's ToTensor and Normalize: float32, channels first."""
    pixels = torch.from_numpy(pillow_view(image).copy()).permute(2, 0, 1).contiguous().float().div(255)
    return pixels.sub_(MEAN).div_(STD).numpy()


def webdataset_pillow(
    dataset: ShardDataset, images: int, view: Callable[[Image.Image], np.ndarray] = pillow_view
) -> Iterator[int]:
    """The usual recipe: shards → shuffle buffer → decode("pil") → view → batch."""
    pipeline = (
        wds.WebDataset(dataset.uris, shardshuffle=False, empty_check=False)
        .shuffle(1000, initial=100)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(view, int)
        .batched(BATCH)
    )
    for pixels, labels in pipeline:
        torch.from_numpy(np.stack(pixels) if isinstance(pixels, list) else pixels)
        yield len(labels)


def feed(dataset: ShardDataset, images: int, workers: int = 0) -> Iterator[int]:
    """This project's loader."""
    order = Order(dataset.shard_samples, seed=1, streams=4, global_batch=BATCH)
    with TrainFeed(dataset, order, VIEW, seed=1, epochs=1, loader_workers=workers) as batches:
        for batch in batches:
            yield len(batch)


def bare_loop(dataset: ShardDataset, images: int) -> Iterator[int]:
    """Decode, crop and resize bytes that are in memory already, in shard order; nothing else."""
    samples = list(dataset.read(np.arange(len(dataset))))
    draws = VIEW.draws(1, 0, np.arange(len(dataset)))
    out = torch.empty((BATCH, 224, 224, 3), dtype=torch.uint8)
    yield 0  # reading is not part of it
    for row, sample in enumerate(samples):
        out[row % BATCH] = VIEW.render(sample.bytes, draws[row])
        yield 1


def measure(stream: Iterator[int]) -> tuple[float, float]:
    """Images per CPU second and per second of wall time, after the first item."""
    next(stream)
    cpu, wall, count = time.process_time(), time.perf_counter(), 0
    for done in stream:
        count += done
    return count / (time.process_time() - cpu), count / (time.perf_counter() - wall)


def main() -> None:
    """Run the comparison and print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds, under a minute")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    arguments = parser.parse_args()
    images = arguments.images or (768 if arguments.quick else 2048)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = write_folder(Path(folder) / "in", images)
        config = ShardConfig(name="bench", source=str(source), shard_samples=256)
        ref = run(config, {}, StageContext(out=f"{folder}/out", resources=Resources(workers=1))).artifact
        assert isinstance(ref, DatasetRef)
        dataset = ShardDataset.open(ref.manifest, "train")
        kb = sum(shard.bytes for shard in dataset.shards) / images / 1e3
        print(f"{images} JPEGs of {kb:.0f} KB; region decoding: {region.available()}")
        loops: dict[str, Callable[[ShardDataset, int], Iterator[int]]] = {
            "webdataset + Pillow": webdataset_pillow,
            "… to float": partial(webdataset_pillow, view=normalised_view),
            "bare loop": bare_loop,
            "feed": feed,
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        for _ in range(rounds):
            for name, loop in loops.items():
                found[name].append(measure(loop(dataset, images)))
        speed = {name: statistics.median(cpu for cpu, _ in values) for name, values in found.items()}
        for name, values in found.items():
            wall = statistics.median(wall for _, wall in values)
            print(f"{name:22s} {speed[name]:8.0f} images/s of CPU {wall:8.0f} images/s of wall time")
        memory = _worker_memory(dataset)
    result = {
        "per_core_over_webdataset_pillow": speed["feed"] / speed["webdataset + Pillow"],
        "per_core_over_webdataset_pillow_to_float": speed["feed"] / speed["… to float"],
        "share_of_bare_loop": speed["feed"] / speed["bare loop"],
        "images_per_core_s": speed["feed"],
        "webdataset_pillow_images_per_core_s": speed["webdataset + Pillow"],
        "worker_memory_mb": memory,
        "region_decoding": region.available(),
        "jpeg_kb": kb,
    }
    print(
        json.dumps(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}
        )
    )


def _worker_memory(dataset: ShardDataset) -> float:
    """Memory of one loader process (unique set size) after some batches, in MB."""
    stream = feed(dataset, 0, workers=1)
    for _ in range(min(8, len(dataset) // BATCH)):
        next(stream)
    loaders = [
        child
        for child in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    memory = max(child.memory_full_info().uss for child in loaders) / 1e6
    stream.close()  # type: ignore[attr-defined]
    return memory


if __name__ == "__main__":
    main()
