"""Frozen features: the mean over the backbone's final tokens, one row for each image of this rank's share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster import distributed

# Rows that are worked on at once: 16384 × 1024 similarities in float64 are 128 MB, and as much again to rank them.
CHUNK = 16384


@dataclass(frozen=True)
class Features:
    """This rank's share of a split: ranks hold successive, disjoint runs of samples.

    `x_NC` fp32 on the device, `y_N` int64 labels on the device, `total` samples on all ranks.
    """

    x_NC: Tensor
    y_N: Tensor
    total: int

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs of at most CHUNK rows."""
        yield from zip(self.x_NC.split(CHUNK), self.y_N.split(CHUNK), strict=True)


def collect(batches: Iterable[tuple[Any, Tensor]], *, samples: int, width: int, device: str) -> Features:
    """Features of (batch, tokens (B, N, C)) pairs. Collective: every rank calls it once.

    Args:
        samples: of the whole split, which the rows of all ranks must add up to.
    """
    rows, labels = [torch.empty(0, width, device=device)], [torch.empty(0, dtype=torch.int64, device=device)]
    for batch, tokens_BNC in batches:
        rows.append(tokens_BNC.float().mean(1))
        labels.append(batch.labels.to(device))
    x_NC, y_N = torch.cat(rows), torch.cat(labels)
    total = int(distributed.all_reduce_sum(torch.tensor(len(y_N), device=device)))
    assert total == samples, f"the ranks saw {total} of {samples} samples"
    return Features(x_NC, y_N, total)
