"""Bring batches to the training device one step ahead of need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

from stages.data.batch import Batch


def on_device(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Batches on `device`, each asked for and copied before the one ahead of it is given.

    On a GPU a side stream copies, so that the copy goes on while the step before computes; for that it must come from
    pinned memory, which feeds give where there is a GPU. Sample ids stay on the host, which draws random numbers from
    them. On the CPU batches pass through as they are, none ahead of time.
    """
    device = torch.device(device)
    if device.type == "cpu":
        yield from batches
        return
    source = iter(batches)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copied() -> Batch | None:
        host = next(source, None)
        with torch.cuda.stream(side) if side is not None else nullcontext():
            return host.to(device) if host is not None else None

    ahead = copied()
    while ahead is not None:
        batch = ahead
        if side is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(side)  # before the next copy is on it
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(
                    current
                )  # its memory is the side stream's, but not free before this one is done
        ahead = copied()
        yield batch
