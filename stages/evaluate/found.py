"""What an evaluator hands back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Values = Iterator[tuple[str, float]]  # what an evaluator yields: (metric, value)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The values of one evaluator at one setting, and what they are values of.

    Args:
        values: (metric, value) as yielded.
        samples: images that the values cover.
        evaluator: the resolved config, which identifies the values.
        variant, on_data: as in `stages.artifacts.Measurement`.
        table: the content of a JSON file beside the values.
        notes: what a person should read.
    """

    values: list[tuple[str, float]]
    samples: int
    evaluator: dict[str, Any]
    variant: str = ""
    on_data: bool = True
    table: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
