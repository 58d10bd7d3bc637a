"""Bring batches to the training device one step ahead of need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch

from stages.data.feed import Batch


class DeviceBatches:
    """Batches on `device`; on a GPU the next one is copied by a side stream while the current one is used.

    The copies overlap with computation only from pinned memory, which feeds give where there is a GPU. On
    the CPU batches pass through as they are.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device | str) -> None:
        self._batches, self._device = iter(batches), torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._next: Batch | None = None
        self._started = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            return next(self._batches)
        if not self._started:
            self._started = True
            self._copy()
        if self._next is None:
            raise StopIteration
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        batch = self._next
        for tensor in (batch.images, batch.labels, batch.sample_ids):
            # Made on the side stream, used on this one: its memory must not be reused before that is done.
            tensor.record_stream(torch.cuda.current_stream(self._device))
        self._copy()
        return batch

    def _copy(self) -> None:
        host = next(self._batches, None)
        if host is None:
            self._next = None
            return
        with torch.cuda.stream(self._stream):
            self._next = host.to(self._device)
