"""Batches on the device, and the same augmentation on CPU and GPU within a stated bound."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from stages.artifacts import DatasetRef
from stages.data import augment
from stages.data.batch import Batch
from stages.data.dataset import ShardDataset
from stages.data.device import on_device
from stages.data.feed import TrainFeed
from stages.data.order import Order
from stages.data.rand_augment import DRAWS_PER_OPERATION, rand_augment
from stages.data.rng import Purpose
from stages.data.view import TrainView

# Arithmetic in float32 differs in the last bits; operations on 8-bit levels may fall on the other side of a
# rounding for a few pixels.
BOUND = 1e-4
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def read(ref: DatasetRef, device: str) -> list[tuple]:
    dataset = ShardDataset.open(ref.manifest, "train")
    order = Order(dataset.shard_samples, seed=1, streams=2, global_batch=6, window=2)
    with TrainFeed(dataset, order, TrainView(size=32), seed=1, epochs=2) as feed:
        return [
            (
                b.epoch,
                b.step,
                b.sample_ids.tolist(),
                b.images.float().cpu().sum().item(),
                b.images.device.type,
            )
            for b in on_device(feed, device)
        ]


def test_on_the_cpu_batches_pass_through(tiny_dataset: DatasetRef) -> None:
    batches = read(tiny_dataset, "cpu")
    assert [(epoch, step) for epoch, step, *_ in batches] == [(e, s) for e in range(2) for s in range(5)]


def test_on_the_cpu_no_batch_is_asked_for_ahead_of_time_and_none_is_copied() -> None:
    asked: list[Batch] = []
    for number, batch in enumerate(on_device(made(3, asked), "cpu")):
        assert len(asked) == number + 1 and batch is asked[number]


def test_on_a_device_the_next_batch_is_copied_before_the_one_ahead_of_it_is_given() -> None:
    asked: list[Batch] = []
    for number, batch in enumerate(
        on_device(made(3, asked), "meta")
    ):  # a device without memory, for any machine
        assert len(asked) == min(number + 2, 3) and batch.step == number
        assert batch.images.device.type == batch.labels.device.type == "meta"
        assert batch.sample_ids is asked[number].sample_ids  # random numbers are drawn from them on the host
        assert batch.bad == asked[number].bad
    assert number == 2 and list(on_device(made(0, []), "meta")) == []


def made(count: int, asked: list[Batch]) -> Iterator[Batch]:
    """So many batches; each is noted in `asked` when it is asked for."""
    for step in range(count):
        ids = torch.arange(4) + 4 * step
        asked.append(
            Batch(torch.zeros(4, 2, 2, 3, dtype=torch.uint8), ids, ids, 0, step, 1, ((0, "a/1", "cut"),))
        )
        yield asked[-1]


@gpu
def test_the_device_gets_the_same_batches_in_order(tiny_dataset: DatasetRef) -> None:
    host, device = read(tiny_dataset, "cpu"), read(tiny_dataset, "cuda")
    assert [b[:4] for b in host] == [b[:4] for b in device]
    assert {b[4] for b in device} == {"cuda"}


@gpu
def test_augmentation_is_the_same_on_cpu_and_gpu() -> None:
    ids = np.arange(32)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8))

    def run(device: str) -> list[torch.Tensor]:
        x = augment.to_float01(pixels.to(device))
        x = augment.flip(x, augment.draws(1, Purpose.FLIP, 0, 0, ids)[:, 0])
        jitter = augment.draws(6, Purpose.COLOUR, 0, 0, ids)
        jittered = augment.colour_jitter(x, jitter, brightness=0.4, contrast=0.4, saturation=0.4)
        operations = augment.draws(2 * DRAWS_PER_OPERATION, Purpose.RAND_AUGMENT, 0, 0, ids)
        erase = augment.draws(24, Purpose.ERASE, 0, 0, ids)
        target = augment.one_hot((torch.arange(32) % 10).to(device), 10, 0.1)
        mixing = augment.draws(67, Purpose.MIX, 0, 0, ids)
        return [
            jittered,
            augment.resize_batch(jittered, 48),
            rand_augment(x, operations),
            augment.random_erasing(augment.normalise(x, (0.5,) * 3, (0.5,) * 3), erase, probability=0.5),
            *augment.mix_batch(x, target, mixing, mixup_alpha=0.8, cutmix_alpha=1.0),
        ]

    for on_cpu, on_gpu in zip(run("cpu"), run("cuda"), strict=True):
        off = (on_cpu - on_gpu.cpu()).abs()
        assert (off > BOUND).float().mean() < 1e-3 and off.mean() < BOUND
