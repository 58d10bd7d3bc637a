"""The order of samples: exactly once, independent of the world size, resumable anywhere."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, DataInvalid
from stages.data.order import Order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    streams = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    batch = streams * draw(st.integers(1, 4))
    shards = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    shards.append(batch)  # at least one full batch
    return Order(
        shards,
        seed=draw(st.integers(0, 2**63)),
        streams=streams,
        global_batch=batch,
        window=draw(st.integers(1, 4)),
    )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3))
def test_an_epoch_visits_every_sample_at_most_once_and_drops_less_than_one_batch(
    order: Order, epoch: int
) -> None:
    ids = np.concatenate([order.batch(epoch, step) for step in range(order.steps_per_epoch)])
    assert len(set(ids.tolist())) == len(ids) == order.samples - order.dropped
    assert 0 <= order.dropped < order.global_batch
    assert ids.min() >= 0 and ids.max() < order.samples


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3), st.data())
def test_every_world_size_sees_the_same_global_batches(order: Order, epoch: int, data: st.DataObject) -> None:
    world_size = data.draw(st.sampled_from(divisors(order.streams)))
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    parts = [order.rank_batch(epoch, step, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {order.global_batch // world_size}
    assert sorted(np.concatenate(parts)) == sorted(order.batch(epoch, step))


@settings(max_examples=40, deadline=None)
@given(orders(), st.data())
def test_resuming_on_other_world_sizes_repeats_and_misses_nothing(order: Order, data: st.DataObject) -> None:
    """Two epochs in segments, each read by a fresh object on its own world size, against one whole read."""
    total = 2 * order.steps_per_epoch
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=3))})
    seen = []
    for begin, end in pairwise(cuts):
        world_size = data.draw(st.sampled_from(divisors(order.streams)))
        fresh = Order(
            order.shard_samples.tolist(),
            seed=order.seed,
            streams=order.streams,
            global_batch=order.global_batch,
            window=order.window,
        )
        for position in range(begin, end):
            epoch, step = divmod(position, order.steps_per_epoch)
            parts = [fresh.rank_batch(epoch, step, rank, world_size) for rank in range(world_size)]
            seen.append(frozenset(np.concatenate(parts).tolist()))
    whole = [frozenset(order.batch(*divmod(p, order.steps_per_epoch)).tolist()) for p in range(total)]
    assert seen == whole


@settings(max_examples=30, deadline=None)
@given(orders(), st.integers(2, 3))
def test_the_batch_size_does_not_change_the_streams(order: Order, factor: int) -> None:
    assume(order.samples >= factor * order.global_batch)
    wider = Order(
        order.shard_samples.tolist(),
        seed=order.seed,
        streams=order.streams,
        global_batch=factor * order.global_batch,
        window=order.window,
    )
    for stream in range(order.streams):
        assert np.array_equal(order.stream(1, stream), wider.stream(1, stream))


def test_a_stream_touches_few_shards_at_a_time() -> None:
    order = Order([50] * 40, seed=3, streams=4, global_batch=40, window=3)
    for stream in range(4):
        shards = order.shard_of(order.stream(0, stream))
        for begin in range(0, len(shards), 150):  # a window of 3 shards of 50 samples
            assert len(set(shards[begin : begin + 100])) <= 4


def test_epochs_and_seeds_give_other_orders() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return Order([100] * 8, seed=seed, streams=4, global_batch=40).batch(epoch, 0).tolist()

    assert len({tuple(first(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_is_pinned() -> None:
    """A change here means that runs begun with older code cannot be resumed: say so in the changelog."""
    order = Order([5, 7, 6, 6], seed=7, streams=2, global_batch=4, window=2)
    assert [order.batch(0, 0).tolist(), order.batch(3, 5).tolist()] == PINNED


PINNED = [[18, 0, 8, 14], [8, 21, 0, 1]]


def test_an_imagenet_epoch_is_planned_fast_and_small() -> None:
    shards = [1252] * 1023 + [371]  # 1,281,167 samples
    tracemalloc.start()
    began = time.process_time()  # a busy machine is not the plan's fault
    order = Order(shards, seed=0, streams=64, global_batch=2048)
    order.batch(0, 0)  # plans every stream
    elapsed = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.samples == 1_281_167 and order.steps_per_epoch == 625
    assert elapsed < 10.0, (
        f"{elapsed:.2f} s"
    )  # a fraction of it here; a plan that is not linear takes minutes
    assert peak < 200e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize(("streams", "batch", "world"), [(4, 10, 1), (4, 8, 3), (8, 16, 16)])
def test_numbers_that_do_not_divide_are_refused(streams: int, batch: int, world: int) -> None:
    with pytest.raises(ConfigError, match=r"evenly|share"):
        Order([100], seed=0, streams=streams, global_batch=batch).rank_batch(0, 0, 0, world)


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(DataInvalid, match="fewer than one global batch"):
        Order([3], seed=0, streams=4, global_batch=8)
