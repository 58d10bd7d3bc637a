"""The leaderboard: one line for some weights on some data, with the value of each metric."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.registry import ResultRow, better_first
from pipeline.registry.evaluated import data_names, data_of
from pipeline.registry.events import ANY_DATA
from pipeline.registry.metrics import known_direction
from pipeline.report.charts import ModelKey, model_of

METRICS = 14  # columns of the leaderboard; further metrics are on the page of all results
# Metrics that come first, in this order.
_FIRST = (
    "top1", "top5", "knn_top1", "linear_top1", "loss", "ece", "mean_class_top1", "worst_class_top1",
    "images_per_s", "latency_p50_ms", "latency_p99_ms", "flops", "peak_memory_bytes",
)  # fmt: skip
# Metrics of a classifier's whole model, to which its speed belongs.
_OF_A_MODEL = {"top1", "top5", "loss"}


@dataclass(frozen=True)
class Line:
    """One line of the leaderboard: some weights, in one variant, on some data; the value of each metric."""

    data: str  # its name; with digits of its fingerprint where equal names are different data
    variant: str
    step: str  # that made the weights, or that evaluated them where nobody knows
    sha256: str
    init: str
    seed: int
    at: str
    samples: int
    values: dict[str, ResultRow]


def metrics_of(rows: Sequence[ResultRow]) -> list[str]:
    """The metrics that rows have: the well-known ones first, then by how often they occur."""
    counts = Counter(row.metric for row in rows)
    known = [name for name in _FIRST if name in counts]
    return known + sorted(set(counts) - set(known), key=lambda name: (-counts[name], name))


def leaderboard(rows: Sequence[ResultRow], trained: dict[str, str]) -> tuple[list[str], list[Line]]:
    """The metrics that are columns, and the lines: by data, best first by the first metric (oldest first where nobody
    knows which way it is better).

    Args:
        rows: oldest first.
        trained: sha256 of weights -> the step that made them.
    """
    metrics = metrics_of(rows)[:METRICS]
    groups: dict[tuple[Any, ...], dict[str, ResultRow]] = {}
    speeds: dict[ModelKey, dict[str, ResultRow]] = {}
    for row in rows:
        if row.dataset != ANY_DATA:
            place = (data_of(row), row.checkpoint_sha256, row.variant)
            groups.setdefault(place, {})[row.metric] = row  # the newest
        else:  # of several batch sizes the best
            found = speeds.setdefault(model_of(row), {})
            other, low = found.get(row.metric), known_direction(row.metric)
            if other is not None and low is not None:  # the newest, where nobody knows which is better
                row = better_first([row, other], lower=low)[0]
            found[row.metric] = row
    joined: dict[tuple[Any, ...], dict[str, ResultRow]] = {}
    for place, own in groups.items():
        joined[place] = own
        for key in dict.fromkeys(model_of(row) for row in own.values() if row.metric in _OF_A_MODEL):
            joined[place] = speeds.get(key, {}) | joined[place]
    measured = {model_of(row) for own in groups.values() for row in own.values() if row.metric in _OF_A_MODEL}
    for key in speeds.keys() - measured:
        one = next(iter(speeds[key].values()))
        joined[data_of(one), one.checkpoint_sha256, one.variant] = speeds[key]
    lines = []
    names = data_names(data for data, _, _ in joined)
    for (data, sha256, variant), values in joined.items():
        own = groups.get((data, sha256, variant), values)
        last = max(own.values(), key=lambda row: row.created_at)
        facts = (last.init, last.seed, last.created_at, last.samples)
        lines.append(Line(names[data], variant, trained.get(sha256, last.step), sha256, *facts, values))
    lower = known_direction(metrics[0]) if metrics else None

    def rank(line: Line) -> tuple[Any, ...]:
        row = line.values.get(metrics[0]) if metrics else None
        known = row is not None and lower is not None and math.isfinite(row.value)
        value = row.value * (1 if lower else -1) if known and row else 0.0
        return (line.data == ANY_DATA, line.data, not known, value, line.at)

    return metrics, sorted(lines, key=rank)
