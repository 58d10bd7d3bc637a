"""What a feed hands out: one rank's part of one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from cluster.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """One rank's part of one step."""

    images: torch.Tensor  # uint8 (B, H, W, 3), RGB
    labels: torch.Tensor  # int64 (B,)
    sample_ids: torch.Tensor  # int64 (B,); of the order, also where a sample was replaced
    epoch: int
    step: int  # inside the epoch
    replaced: int  # samples that would not decode and gave way to others
    bad: tuple[tuple[int, str, str], ...] = field(default=(), repr=False)  # (sample id, key, reason) of each

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, parts: int) -> Iterator[Batch]:
        """The batch in equal micro-batches, as views of its memory; `replaced` goes with the first."""
        if len(self) % parts:
            raise ConfigError(f"a batch of {len(self)} cannot be cut into {parts} equal micro-batches")
        size = len(self) // parts
        for index in range(parts):
            part = slice(index * size, (index + 1) * size)
            yield replace(
                self,
                images=self.images[part],
                labels=self.labels[part],
                sample_ids=self.sample_ids[part],
                replaced=self.replaced if index == 0 else 0,
                bad=self.bad if index == 0 else (),
            )

    def pin_memory(self) -> Batch:
        """A copy of what goes to the device in page-locked memory, from which it copies without waiting."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Images and labels on the device, asynchronously from pinned memory; sample ids stay on the host."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )
