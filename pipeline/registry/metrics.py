"""The metrics that are known: which way is better, and in which unit they are written.

One table for everything that ranks or shows values: best, compare, rules of promotion, retention, report, show. A
metric that is not in it has a value and no more; whoever ranks by it says which way is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from pipeline.written import plain


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is known of a metric.

    Args:
        lower: whether lower is better.
        unit: of the values as they are written, `value * factor`.
        digits: after the point; None writes four significant ones.
    """

    lower: bool
    unit: str = ""
    factor: float = 1.0
    digits: int | None = None


_PERCENT = Metric(lower=False, unit="%", digits=2)
METRICS: dict[str, Metric] = {
    "top1": _PERCENT,
    "top5": _PERCENT,
    "knn_top1": _PERCENT,
    "linear_top1": _PERCENT,
    "mean_class_top1": _PERCENT,
    "worst_class_top1": _PERCENT,
    "loss": Metric(lower=True, digits=4),
    "train_loss": Metric(lower=True, digits=4),
    "ece": Metric(lower=True, digits=4),
    "images_per_s": Metric(lower=False, unit="images/s"),
    "latency_p50_ms": Metric(lower=True, unit="ms"),
    "latency_p99_ms": Metric(lower=True, unit="ms"),
    "flops": Metric(lower=True, unit="GFLOPs", factor=1e-9),
    "peak_memory_bytes": Metric(lower=True, unit="MB", factor=1e-6),
    "memory_bytes": Metric(lower=True, unit="MB", factor=1e-6),
    "train_seconds": Metric(lower=True, unit="s"),
}


def known_direction(metric: str) -> bool | None:
    """Whether lower values are better; None for a metric that nobody declared."""
    return METRICS[metric].lower if metric in METRICS else None


def direction(metric: str, told: bool | None = None) -> bool:
    """Whether lower values are better; `told` decides it for a metric that is not known.

    Raises ConfigError when nothing says it, or when what was told is wrong of a known metric.
    """
    known = known_direction(metric)
    if known is None and told is None:
        raise ConfigError(
            f"nobody knows whether higher or lower values of '{metric}' are better",
            expected=f"a known metric ({', '.join(METRICS)}), or the direction",
            remedy='say it: --lower-is-better or --higher-is-better; in a retention rule "lower_is_better"',
        )
    if known is not None and told not in (None, known):
        raise ConfigError(
            f"{way(told)} values of '{metric}' were said to be better",
            expected=f"{metric}: {way(known)} is better",
            remedy="leave the direction out: this metric's is known",
        )
    return bool(told if known is None else known)


def way(lower: bool | None) -> str:
    """The direction as a word."""
    return "lower" if lower else "higher"


def unit(metric: str) -> str:
    """The unit in which `measure` writes this metric; empty for a plain number."""
    return METRICS[metric].unit if metric in METRICS else ""


def heading_unit(metric: str) -> str:
    """The unit, where the metric's name does not say it."""
    return "" if metric.endswith(("_per_s", "_ms", "_seconds")) else unit(metric)


def measure(value: Any, metric: str = "") -> str:
    """A metric's value as text, in its unit."""
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    known = METRICS.get(metric, Metric(lower=False))
    scaled = value * known.factor
    return f"{scaled:.{known.digits}f}" if known.digits is not None else plain(scaled)
