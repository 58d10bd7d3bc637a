"""The leaderboard, and how values are written: with units, and no more digits than they deserve."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.registry import LOWER_IS_BETTER, ResultRow, better_first
from pipeline.registry.events import ANY_DATA
from pipeline.report.charts import ModelKey, model_of

METRICS = 14  # columns of the leaderboard; further metrics are on the page of all results
# Metrics that come first, in this order.
_FIRST = (
    "top1", "top5", "knn_top1", "linear_top1", "loss", "ece", "mean_class_top1", "worst_class_top1",
    "images_per_s", "latency_p50_ms", "latency_p99_ms", "flops", "peak_memory_bytes",
)  # fmt: skip
# Metrics of a classifier's whole model, to which its speed belongs.
_OF_A_MODEL = {"top1", "top5", "loss"}
# Metric -> unit, factor, digits after the point (None: four significant ones).
_UNITS: dict[str, tuple[str, float, int | None]] = {
    "top1": ("%", 1.0, 2),
    "top5": ("%", 1.0, 2),
    "knn_top1": ("%", 1.0, 2),
    "linear_top1": ("%", 1.0, 2),
    "mean_class_top1": ("%", 1.0, 2),
    "worst_class_top1": ("%", 1.0, 2),
    "loss": ("", 1.0, 4),
    "ece": ("", 1.0, 4),
    "images_per_s": ("images/s", 1.0, None),
    "latency_p50_ms": ("ms", 1.0, None),
    "latency_p99_ms": ("ms", 1.0, None),
    "flops": ("GFLOPs", 1e-9, None),
    "peak_memory_bytes": ("MB", 1e-6, None),
    "memory_bytes": ("MB", 1e-6, None),
    "train_seconds": ("s", 1.0, None),
}


@dataclass(frozen=True)
class Line:
    """One line of the leaderboard: some weights, in one variant, on some data; the value of each metric."""

    dataset: str
    split: str
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
    """The metrics that are columns, and the lines, best first by the first of these.

    Args:
        rows: oldest first.
        trained: sha256 of weights -> the step that made them.
    """
    metrics = metrics_of(rows)[:METRICS]
    groups: dict[tuple[str, str, str, str], dict[str, ResultRow]] = {}
    speeds: dict[ModelKey, dict[str, ResultRow]] = {}
    for row in rows:
        if row.dataset != ANY_DATA:
            place = (row.dataset, row.split, row.checkpoint_sha256, row.variant)
            groups.setdefault(place, {})[row.metric] = row  # the newest
        else:  # of several batch sizes the best
            found = speeds.setdefault(model_of(row), {})
            found[row.metric] = better_first([row, *(found[m] for m in (row.metric,) if m in found)])[0]
    joined: dict[tuple[str, str, str, str], dict[str, ResultRow]] = {}
    for place, own in groups.items():
        joined[place] = own
        for key in dict.fromkeys(model_of(row) for row in own.values() if row.metric in _OF_A_MODEL):
            joined[place] = speeds.get(key, {}) | joined[place]
    measured = {model_of(row) for own in groups.values() for row in own.values() if row.metric in _OF_A_MODEL}
    for key in speeds.keys() - measured:
        one = next(iter(speeds[key].values()))
        joined[ANY_DATA, ANY_DATA, one.checkpoint_sha256, one.variant] = speeds[key]
    lines = []
    for (dataset, split, sha256, variant), values in joined.items():
        own = groups.get((dataset, split, sha256, variant), values)
        last = max(own.values(), key=lambda row: row.created_at)
        facts = (last.init, last.seed, last.created_at, last.samples)
        lines.append(Line(dataset, split, variant, trained.get(sha256, last.step), sha256, *facts, values))
    sign = 1 if metrics and metrics[0] in LOWER_IS_BETTER else -1

    def rank(line: Line) -> tuple[Any, ...]:
        row = line.values.get(metrics[0]) if metrics else None
        known = row is not None and math.isfinite(row.value)
        data = (line.dataset == ANY_DATA, line.dataset, line.split)
        return (*data, not known, sign * row.value if known and row else 0.0, line.at)

    return metrics, sorted(lines, key=rank)


def unit(metric: str) -> str:
    """The unit in which `measure` writes this metric; empty for a plain number."""
    return _UNITS.get(metric, ("", 1.0, None))[0]


def heading_unit(metric: str) -> str:
    """The unit, where the metric's name does not say it."""
    return "" if metric.endswith(("_per_s", "_ms", "_seconds")) else unit(metric)


def measure(value: Any, metric: str = "") -> str:
    """A metric's value as text, in its unit."""
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    _, factor, digits = _UNITS.get(metric, ("", 1.0, None))
    return f"{value * factor:.{digits}f}" if digits is not None else plain(value * factor)


def plain(value: float) -> str:
    """Four significant digits, thousands apart by commas: 12,480, 0.0731, 2.1e-06, nan."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e15:
        digits = max(3 - math.floor(math.log10(abs(value))), 0)
        return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def size(count: int) -> str:
    """Bytes as text: 873 B, 5.5 MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float | None) -> str:
    """Seconds as text: 0.4 s, 47 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for name, of, below in (("d", 86400, "h"), ("h", 3600, "min"), ("min", 60, "s")):
        if whole >= of:
            rest = whole % of // {"h": 3600, "min": 60, "s": 1}[below]
            return f"{whole // of} {name} {rest} {below}" if rest else f"{whole // of} {name}"
    return f"{whole} s"


def moment(at: str) -> str:
    """An ISO time as `2026-11-22 16:40` (times in the registry are UTC)."""
    return at[:16].replace("T", " ")
