"""Feeds: batches in the order of the run, decoded ahead of need.

A training feed yields one batch per global step: this rank's part of it. What a batch holds depends on
(seed, epoch, step, rank, world size) alone, never on the number of loader processes. With
`loader_workers=0` one thread of this process decodes (libjpeg and torch release the GIL); with more,
spawned processes do and hand the pixels over in shared memory (torch's DataLoader moves them).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from cluster.errors import ConfigError, DataInvalid
from stages.data.batch import Batch
from stages.data.dataset import ShardDataset
from stages.data.decode import BadImage
from stages.data.order import Order
from stages.data.prefetch import Failure, prefetch, shareable
from stages.data.read_ahead import ReadAhead
from stages.data.rng import Purpose, mix
from stages.data.view import EvalView, TrainView

log = logging.getLogger(__name__)

_REPLACEMENTS = 100  # tries to find a sample that decodes before the data set counts as broken
_SHOWN = 10


@dataclass(frozen=True)
class _Loader:
    """Makes a batch from its cursor; the picklable part of a feed, used in threads and processes alike."""

    dataset: ShardDataset
    view: TrainView | EvalView
    seed: int
    replace_bad: bool

    def load(self, ids: np.ndarray, epoch: int, step: int) -> Batch:
        size = self.view.size
        images = shareable(len(ids), size, size, 3)
        labels = np.empty(len(ids), np.int64)
        bad = []
        draws = self.view.draws(self.seed, epoch, ids)
        for row, sample in enumerate(self.dataset.read(ids)):
            try:
                images[row] = self.view.render(sample.bytes, draws[row])
                labels[row] = sample.label
            except BadImage as error:
                bad.append((sample.id, sample.key, error.message))
                if self.replace_bad:
                    images[row], labels[row] = self._replacement(sample.id, epoch, draws[row])
        return Batch(
            images,
            torch.from_numpy(labels),
            torch.from_numpy(ids.astype(np.int64)),
            epoch,
            step,
            len(bad),
            tuple(bad),
        )

    def _replacement(self, sample_id: int, epoch: int, draws: np.ndarray) -> tuple[torch.Tensor, int]:
        for attempt in range(_REPLACEMENTS):
            other = int(
                mix(self.seed, epoch, int(Purpose.REPLACEMENT), sample_id, attempt)
                % np.uint64(len(self.dataset))
            )
            [sample] = self.dataset.read(np.array([other]))
            try:
                return self.view.render(sample.bytes, draws), sample.label
            except BadImage:
                continue
        raise DataInvalid(
            f"{_REPLACEMENTS} samples in a row do not decode", remedy="check the data set: itpn shard verify"
        )


@dataclass(frozen=True)
class _TrainLoader(_Loader):
    order: Order
    rank: int
    world_size: int

    def __call__(self, cursor: tuple[int, int]) -> Batch:
        return self.load(self.order.rank_batch(*cursor, self.rank, self.world_size), *cursor)


@dataclass(frozen=True)
class _EvalLoader(_Loader):
    def __call__(self, cursor: tuple[int, int, int]) -> Batch:
        begin, end, step = cursor
        return self.load(np.arange(begin, end), 0, step)


def too_many_bad(bad: Mapping[int, tuple[str, str]], limit: int) -> DataInvalid:
    """The error for more than `limit` samples that do not decode; `bad` maps sample id to (key, reason)."""
    shown = "\n".join(f"    {key} (sample {i}): {why}" for i, (key, why) in list(bad.items())[:_SHOWN])
    return DataInvalid(
        f"{len(bad)} samples do not decode:\n{shown}",
        expected=f"at most {limit}",
        found=f"{len(bad)}" + (f", the first {_SHOWN} listed" if len(bad) > _SHOWN else ""),
        remedy="repair the source and shard again, or raise max_bad_fraction",
    )


class _Feed:
    """Iterates over prefetched batches, keeps count of waiting and of bad samples, and closes."""

    def __init__(self, loader: Any, cursors: Iterator[Any], workers: int, bad_limit: int, pin: bool) -> None:
        self.wait_s = 0.0  # seconds that the consumer has waited for data
        self.replaced = 0  # samples replaced so far
        self.bad: dict[int, tuple[str, str]] = {}  # sample id -> (key, reason)
        self.bad_limit = bad_limit  # distinct bad samples; the training loop holds all ranks together to it
        self._read_ahead: ReadAhead | None = None
        self._batches = prefetch(
            loader, cursors, workers=workers, pin_memory=pin and torch.cuda.is_available()
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._batches)
        self.wait_s += time.perf_counter() - began
        if isinstance(batch, Failure):
            self.close()
            raise batch.error
        if self._read_ahead is not None:
            self._read_ahead.advance((batch.epoch, batch.step))
        self.replaced += batch.replaced
        self.bad.update({sample_id: (key, reason) for sample_id, key, reason in batch.bad})
        if len(self.bad) > self.bad_limit:
            self.close()
            raise too_many_bad(self.bad, self.bad_limit)
        return batch

    def close(self) -> None:
        """Stop the threads and processes; safe to call twice."""
        if self._read_ahead is not None:
            self._read_ahead.close()
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TrainFeed(_Feed):
    """This rank's part of every global batch from `start` on.

    Args:
        seed: of the run: crops and replacements are functions of (seed, epoch, sample).
        micro_batches: parts that the caller will cut each batch into; checked to divide it.
        start: the cursor (epoch, step) to begin at.
        epochs: end after this many epochs, counted from the beginning of the run; or
        max_steps: after this many global steps, counted likewise. Without either the feed never ends.
        loader_workers: decoding processes; 0 is one thread.
        max_bad_fraction: distinct undecodable samples that may be met, as a share of the data set. A feed sees
            its own rank since `start`; `bad_limit` is for the loop, which counts all ranks over the whole run.

    Raises (when iterated): DataInvalid with the list once more samples are bad; WorkerLost when a loader
    process dies.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        order: Order,
        view: TrainView | EvalView,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        start: tuple[int, int] = (0, 0),
        epochs: int | None = None,
        max_steps: int | None = None,
        loader_workers: int = 0,
        max_bad_fraction: float = 0.001,
        pin_memory: bool = True,
    ) -> None:
        per_rank = len(order.rank_streams(rank, world_size)) * order.per_stream
        if per_rank % micro_batches:
            raise ConfigError(
                f"{per_rank} samples per rank and step cannot be cut into {micro_batches} equal micro-batches",
                expected=f"a number of micro-batches that divides {per_rank}",
                remedy="change the micro-batch size or the global batch",
            )
        if order.samples != len(dataset):
            raise ConfigError(
                "order and data set are of different sizes", expected=len(dataset), found=order.samples
            )
        self.samples_per_step = per_rank
        ends = [epochs * order.steps_per_epoch] if epochs is not None else []
        ends += [max_steps] if max_steps is not None else []
        end = min(ends) if ends else None
        position = start[0] * order.steps_per_epoch + start[1]
        super().__init__(
            _TrainLoader(dataset, view, seed, True, order.copy(), rank, world_size),
            _cursors(position, end, order.steps_per_epoch),
            loader_workers,
            int(max_bad_fraction * len(dataset)),
            pin_memory,
        )
        if dataset.cached:
            mean = sum(shard.bytes for shard in dataset.shards) / len(dataset.shards)
            at_once = int(order.window * len(order.rank_streams(rank, world_size)) * mean)
            if at_once > dataset.cache_bytes:
                log.warning(
                    "rank %d reads shards of %d MB at once, but the cache holds %d MB: they will be fetched "
                    "again and again; raise data.cache.max_bytes, or lower data.window or data.streams",
                    rank, at_once >> 20, dataset.cache_bytes >> 20,
                )  # fmt: skip
            cursors = _cursors(position, end, order.steps_per_epoch)
            self._read_ahead = ReadAhead(dataset, order.copy(), rank, world_size, cursors)


class EvalFeed(_Feed):
    """Every sample of the split exactly once over all ranks, in order; the tail may be uneven.

    No collective is called inside, so ranks may end at different times. A sample that will not decode is
    DataInvalid: a figure over part of the split would not be that split's figure.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        view: TrainView | EvalView,
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 64,
        loader_workers: int = 0,
        pin_memory: bool = True,
    ) -> None:
        begin, end = (len(dataset) * r // world_size for r in (rank, rank + 1))
        starts = range(begin, end, batch_size)
        super().__init__(
            _EvalLoader(dataset, view, 0, False),
            ((first, min(first + batch_size, end), step) for step, first in enumerate(starts)),
            loader_workers,
            0,
            pin_memory,
        )


def _cursors(position: int, end: int | None, steps_per_epoch: int) -> Iterator[tuple[int, int]]:
    while end is None or position < end:
        yield divmod(position, steps_per_epoch)
        position += 1
