"""The store through which ranks find each other, with names of their own for every start.

torchrun keeps one TCPStore for all restarts of a group (pytorch issue 135712), and torch prefixes nothing there: a
restarted rank that is quicker than its peers reads the addresses which the dead ones left, and its connection is
refused, or hangs. The count of restarts is no remedy, since every machine's torchrun counts for itself. So the ranks
agree on a name that none can know beforehand, and put all they say to each other under it.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from cluster.errors import WorkerLost

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_S = 0.02


def open_store(rank: int, world_size: int, timeout_s: float) -> Store | None:
    """The store of this start under torchrun; None where the group has a store to itself anyway.

    Raises WorkerLost when the other ranks have not come within `timeout_s`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world_size == 1:
        return None
    from torch.distributed import PrefixStore, TCPStore

    shared = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
    )
    name = agree_on_name(shared, rank, world_size, timeout_s)
    return PrefixStore(f"start/{name}", shared)


def agree_on_name(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A string that is new and equal on all ranks, whatever dead processes have left in `store`.

    Every rank leaves a word that only this process knows, and rank 0 answers each word it finds with the name. A
    word of a dead process is answered too, but only living ranks confirm, and rank 0 waits for all of them.
    """
    from torch.distributed import DistStoreError

    deadline = time.monotonic() + timeout_s
    word = uuid.uuid4().hex
    if rank:
        store.set(f"word/{rank}", word)
        try:
            store.wait([f"answer/{word}"], timedelta(seconds=timeout_s))
        except DistStoreError:
            raise _absent("rank 0 has", timeout_s) from None
        name = store.get(f"answer/{word}").decode()
        store.set(f"confirmed/{name}/{rank}", "")
        return name
    answered: set[str] = set()
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"confirmed/{word}/{other}"]):
                missing.discard(other)
            elif store.check([f"word/{other}"]):
                theirs = store.get(f"word/{other}").decode()
                if theirs not in answered:
                    store.set(f"answer/{theirs}", word)
                    answered.add(theirs)
        if missing and time.monotonic() > deadline:
            raise _absent(f"ranks {', '.join(map(str, sorted(missing)))} have", timeout_s)
        time.sleep(_POLL_S)
    return word


def _absent(who: str, seconds: float) -> WorkerLost:
    return WorkerLost(
        f"{who} not come within {seconds:.0f} s",
        expected="all ranks of the group",
        remedy="look at the logs of those ranks; run again: training resumes from its last checkpoint",
    )
