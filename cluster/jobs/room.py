"""Room for a group: how many of its workers fit now, and asking the cluster for more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cluster.jobs.stopping import draining
from cluster.resources import Resources


def per_worker(resources: Resources) -> dict[str, float]:
    """What one worker holds, by Ray's names."""
    return {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})


def fitting(resources: Resources) -> int:
    """How many workers fit on the nodes that are there to stay, beside what runs on them."""
    from ray._private.state import available_resources_per_node

    wanted = {name: count for name, count in per_worker(resources).items() if count}
    going, room = draining(), 0
    for node, free in available_resources_per_node().items():
        if node not in going:
            room += min(int(free.get(name, 0.0) / count + 1e-6) for name, count in wanted.items())
    return room


@contextmanager
def asked_for(size: int, resources: Resources, work: str) -> Iterator[Callable[[float], bool]]:
    """Ask the cluster for room for `size` workers, so that one which can grow does; the room is free again afterwards.

    Yields whether there is room, a function of the seconds to wait for it.

    Args:
        work: names what the room is for; `forget` gives it back when the task that asks is killed.
    """
    from ray.util import placement_group, remove_placement_group

    forget(work)
    group = placement_group([per_worker(resources)] * size, name=f"itpn-room-{work}")
    try:
        yield group.wait
    finally:
        remove_placement_group(group)


def forget(work: str) -> None:
    """Give back the room that is asked for, or held, for `work`; Ray would keep it for as long as the driver lives."""
    from ray.util import get_placement_group, remove_placement_group

    with suppress(ValueError):  # there is none of this name
        remove_placement_group(get_placement_group(f"itpn-room-{work}"))
