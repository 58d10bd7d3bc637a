"""The order of samples: canonical streams, the same global batches on any number of ranks.

An epoch's shards are permuted and laid end to end; the sequence is cut into S streams of equal sample
count (a shard may straddle two). Each stream is shuffled in blocks: all samples of `window` neighbouring
shard pieces are permuted together, so a reader needs that many shards of each of its streams at hand.
Global batch t takes its B samples evenly from the streams; of R ranks, rank r reads streams r, r+R, ….

Everything here is a pure function of (shard sizes, seed, epoch, streams, window); B only says how many
samples one step takes, R only who takes which. The cursor of a run is therefore just (epoch, step).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.errors import ConfigError, DataInvalid
from stages.data.rng import Purpose, mix, permutation


class Order:
    """Which samples make up each global batch.

    Args:
        shard_samples: samples of each shard; sample ids count through the shards in this order.
        seed: of the run.
        streams: S, fixed by the recipe; the world size must divide it, and it must divide `global_batch`.
        global_batch: B, samples per step over all ranks.
        window: shard pieces shuffled together inside a stream.

    Attributes:
        steps_per_epoch: full global batches per epoch.
        dropped: samples left out of each epoch (fewer than one batch; other samples in every epoch).
    """

    def __init__(
        self, shard_samples: Sequence[int], *, seed: int, streams: int, global_batch: int, window: int = 8
    ) -> None:
        if streams < 1 or window < 1:
            raise ConfigError(
                "streams and window must be positive", found=f"streams={streams}, window={window}"
            )
        if global_batch < 1 or global_batch % streams:
            raise ConfigError(
                f"the global batch of {global_batch} cannot be taken evenly from {streams} streams",
                expected="a multiple of the number of streams",
                remedy=f"a global batch of {max(1, round(global_batch / streams)) * streams} fits",
            )
        self.shard_samples = np.asarray(shard_samples, np.int64)
        self.first_id = np.concatenate([[0], np.cumsum(self.shard_samples)])
        self.samples = int(self.first_id[-1])
        self.seed, self.streams, self.global_batch, self.window = seed, streams, global_batch, window
        self.per_stream = global_batch // streams
        self.steps_per_epoch = self.samples // global_batch
        self.dropped = self.samples - self.steps_per_epoch * global_batch
        if not self.steps_per_epoch:
            raise DataInvalid(
                f"the data set has {self.samples} samples, fewer than one global batch of {global_batch}",
                remedy="use a smaller global batch or a larger data set",
            )
        self._plans: dict[tuple[int, int], np.ndarray] = {}  # (epoch, stream) -> ids; one epoch at a time
        self._shard_orders: dict[int, np.ndarray] = {}

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """int64 (B,) sample ids of the global batch, grouped by stream."""
        return self.rank_batch(epoch, step, 0, 1)

    def rank_batch(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """int64 (B / world_size,) sample ids of one rank: the samples of its streams.

        Raises ConfigError when the world size does not divide the streams or the cursor is out of range.
        """
        streams = self.rank_streams(rank, world_size)
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ConfigError(
                f"no batch at epoch {epoch}, step {step}",
                expected=f"epoch >= 0 and 0 <= step < {self.steps_per_epoch}",
            )
        begin = step * self.per_stream
        return np.concatenate([self.stream(epoch, s)[begin : begin + self.per_stream] for s in streams])

    def rank_streams(self, rank: int, world_size: int) -> range:
        """The streams that one rank reads."""
        if not 0 <= rank < world_size or self.streams % world_size:
            fits = [n for n in range(1, self.streams + 1) if self.streams % n == 0]
            raise ConfigError(
                f"rank {rank} of {world_size} cannot share {self.streams} streams",
                expected=f"a world size out of {fits}",
                remedy="change the number of workers; changing streams changes the order of samples",
            )
        return range(rank, self.streams, world_size)

    def stream(self, epoch: int, stream: int) -> np.ndarray:
        """int64 (samples // streams,) sample ids of one stream in one epoch, in reading order."""
        plan = self._plans.get((epoch, stream))
        if plan is None:
            if any(planned != epoch for planned, _ in self._plans):
                self._plans.clear()
            plan = self._plans[epoch, stream] = self._plan(epoch, stream)
        return plan

    def shard_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The shard of each sample id."""
        return np.searchsorted(self.first_id, sample_ids, side="right") - 1

    def copy(self) -> Order:
        """The same order with plans of its own: an object may serve one thread only."""
        return Order(
            self.shard_samples.tolist(),
            seed=self.seed,
            streams=self.streams,
            global_batch=self.global_batch,
            window=self.window,
        )

    def _plan(self, epoch: int, stream: int) -> np.ndarray:
        length = self.samples // self.streams
        shards = self._shard_orders.get(epoch)
        if shards is None:
            shards = permutation(len(self.shard_samples), self.seed, epoch, int(Purpose.SHARD_ORDER))
            self._shard_orders = {epoch: shards}
        ends = np.cumsum(self.shard_samples[shards])
        begin, end = stream * length, (stream + 1) * length
        pieces = []
        for position in range(int(np.searchsorted(ends, begin, side="right")), len(shards)):
            shard_begin = int(ends[position] - self.shard_samples[shards[position]])
            if shard_begin >= end:
                break
            first = int(self.first_id[shards[position]])
            low, high = max(begin, shard_begin) - shard_begin, min(end, int(ends[position])) - shard_begin
            if high > low:
                pieces.append(np.arange(first + low, first + high))
        blocks = []
        for index in range(0, len(pieces), self.window):
            ids = np.concatenate(pieces[index : index + self.window])
            keys = mix(self.seed, epoch, int(Purpose.SAMPLE_ORDER), ids)
            blocks.append(ids[np.argsort(keys, kind="stable")])
        return np.concatenate(blocks)
