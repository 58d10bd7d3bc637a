"""What the loop asks of a batch, of a feed, and of a task: the thing that is trained and its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class Batch(Protocol):
    """A rank's part of one global batch (`stages.data.feed.Batch`)."""

    images: Tensor  # uint8 (B, H, W, 3)
    labels: Tensor  # int64 (B,)
    sample_ids: Tensor  # int64 (B,)
    epoch: int
    step: int
    replaced: int
    bad: tuple[tuple[int, str, str], ...]  # (sample id, key, reason) of what was replaced

    def split(self, parts: int) -> Iterator[Any]: ...


class Feed(Protocol):
    """Yields one Batch per global step, from the cursor it was made with."""

    wait_s: float
    bad_limit: int  # distinct samples of the whole run that may have been replaced

    def __iter__(self) -> Iterator[Any]: ...

    def close(self) -> None: ...


MakeFeed = Callable[[tuple[int, int], int], Feed]  # cursor (epoch, step in it), and the run's last step + 1


class Task(Protocol):
    """What is trained: a module and its losses."""

    @property
    def module(self) -> nn.Module:
        """fp32, on the CPU, equal on all ranks."""
        ...

    def losses(self, model: Callable[..., Any], batch: Any, step: int) -> dict[str, Tensor]:
        """Scalars of one micro-batch: `loss` (fp32, with gradient) and one per head. `model` runs the module."""
        ...

    def picture(self, model: Callable[..., Any], batch: Any) -> Any | None:
        """An image (uint8 HWC array) that shows what the model does with `batch`, or None."""
        ...
