"""Ranks that start anew in a store where dead ones have left their names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from cluster.distributed import free_port
from cluster.errors import StepFailed
from cluster.rendezvous import agree_on_name

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def stores():
    from torch.distributed import TCPStore

    port, limit = free_port(), timedelta(seconds=30)
    first = TCPStore("127.0.0.1", port, 3, is_master=True, wait_for_workers=False, timeout=limit)
    return [first, *(TCPStore("127.0.0.1", port, 3, is_master=False, timeout=limit) for _ in range(2))]


def start(stores) -> list[str]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda rank: agree_on_name(stores[rank], rank, 3, 30.0), range(3)))


def test_every_start_has_one_name_of_its_own(stores):
    names = [start(stores) for _ in range(3)]
    assert all(len(set(ranks)) == 1 for ranks in names)
    assert len({ranks[0] for ranks in names}) == 3


def test_word_of_a_dead_rank_does_not_count_as_its_presence(stores):
    stores[0].set("word/1", "of a process that died before it read the answer")
    with pytest.raises(StepFailed, match="ranks 1, 2 have not come"):
        agree_on_name(stores[0], 0, 3, 0.3)
    assert len(set(start(stores))) == 1


def test_absent_rank_zero_is_an_error_not_a_hang(stores):
    with pytest.raises(StepFailed, match="rank 0 has not come"):
        agree_on_name(stores[1], 1, 3, 0.3)
