"""What is drawn: curves of a training from its metric lines, and accuracy against speed from result rows.

A chart is plain JSON that templates/page.js hands to plotly.js:
`{"title", "x", "y", "log_x", "traces": [{"name", "x", "y", "text"?, "href"?, "points"?}], "events": […], "note"}`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.registry import ResultRow
from pipeline.registry.evaluated import data_names, data_of

POINTS = 2000  # of a curve; more are thinned out evenly
ACCURACY = "top1"
# Metric of speed -> title, unit, factor from the metric to the unit.
SPEEDS = {
    "images_per_s": ("Accuracy against throughput", "images/s", 1.0),
    "latency_p50_ms": ("Accuracy against latency", "ms, median", 1.0),
    "flops": ("Accuracy against compute", "GFLOPs per image", 1e-9),
}
# Keys of a metric line that are no measured curve.
_NO_CURVE = {"step", "epoch", "applied"}
# Curve -> title, unit, factor. Whatever else a line holds gets a chart under its own name.
_CURVES = {
    "lr": ("Learning rate", "learning rate", 1.0),
    "images_per_s": ("Throughput", "images/s", 1.0),
    "grad_norm": ("Gradient norm", "norm", 1.0),
    "data_wait_share": ("Waiting for data", "% of the step's time", 100.0),
    "memory_bytes": ("Peak memory", "GB", 1e-9),
}

Chart = dict[str, Any]
ModelKey = tuple[str, str]


def curves(lines: Sequence[dict[str, Any]]) -> list[Chart]:
    """The charts of a training: all losses together (one curve per head), then one chart per other metric."""
    values = [line for line in lines if "event" not in line and _finite(line.get("step"))]
    every = math.ceil(len(values) / POINTS)
    if every > 1:
        values = [*values[:-1:every], values[-1]]
    names = list(dict.fromkeys(name for line in values for name in line if name not in _NO_CURVE))
    losses = sorted(name for name in names if name.startswith("loss"))
    groups = [("Loss", "loss", 1.0, losses)]
    groups += [(*known, [name]) for name, known in _CURVES.items() if name in names]
    groups += [(n, "", 1.0, [n]) for n in names if n not in losses and n not in _CURVES]
    charts = []
    for title, unit, factor, members in groups:
        traces = []
        for name in members:
            points = [(line["step"], _scaled(line[name], factor)) for line in values if name in line]
            if any(y is not None for _, y in points):
                label = _head(name) if title == "Loss" else title
                traces.append({"name": label, "x": [x for x, _ in points], "y": [y for _, y in points]})
        if traces:
            charts.append({"title": title, "x": "training step", "y": unit, "traces": traces})
    if every > 1:
        for chart in charts:
            chart["note"] = f"every {every}th step is drawn"
    if charts and charts[0]["title"] == "Loss":
        charts[0]["events"] = _marks(events(lines))
    return charts


def events(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What happened on the way (steps not applied, roll-backs, samples replaced, …): step, event, details."""
    found = []
    for line in lines:
        if "event" in line:
            facts = {name: value for name, value in line.items() if name not in ("event", "step")}
            details = ", ".join(f"{name}: {_text(value)}" for name, value in facts.items())
            found.append({"step": line.get("step", ""), "event": _text(line["event"]), "details": details})
    return found


def accuracy_speed(rows: Sequence[ResultRow], href: Callable[[ResultRow], str | None]) -> list[Chart]:
    """One chart per metric of speed that was measured, a point for each measurement of it and each data set.

    A point's height is the newest top-1 of the same weights with the same acceleration, resolution and precision.
    Points are told apart by what differs between measurements (batch, resolution, acceleration, device), else by
    initialisation, and by data set where there are several.

    Args:
        rows: oldest first.
        href: the page of a row's weights, if there is one.
    """
    accuracy: dict[ModelKey, dict[str, float]] = {}
    data_name = data_names(map(data_of, rows))
    # Of several ways to judge the same predictions the plain one counts: it has the shortest name.
    for row in sorted(rows, key=lambda row: -len(row.variant)):
        if row.metric == ACCURACY and _finite(row.value):
            labels = " ReaL" if row.evaluator.get("kind") == "real" else ""
            accuracy.setdefault(model_of(row), {})[data_name[data_of(row)] + labels] = row.value
    charts = []
    for metric, (title, unit, factor) in SPEEDS.items():
        drawn = [row for row in rows if row.metric == metric and model_of(row) in accuracy]
        drawn = [row for row in drawn if _finite(row.value) and row.value > 0]  # the axis is logarithmic
        common = set.intersection(*(set(row.variant.split()) for row in drawn)) if drawn else set()
        settings = _differing([_setting(row, common) for row in drawn])
        names = {name for row in drawn for name in accuracy[model_of(row)]}
        traces: dict[str, dict[str, Any]] = {}
        for row, setting in zip(drawn, settings, strict=True):
            for data, value in accuracy[model_of(row)].items():
                name = " · ".join([setting or row.init, *([data] if len(names) > 1 else [])])
                trace = traces.setdefault(name, {"name": name, "points": True})
                about = {"text": f"{row.step} · {data}", "href": href(row)}
                for key, entry in {"x": row.value * factor, "y": value, **about}.items():
                    trace.setdefault(key, []).append(entry)
        if traces:
            ordered = [traces[name] for name in sorted(traces, key=_natural)]
            charts.append(
                {"title": title, "x": unit, "y": f"{ACCURACY} (%)", "log_x": True, "traces": ordered}
            )
    return charts


def model_of(row: ResultRow) -> ModelKey:
    """What a measurement was made of: weights, acceleration, image size, precision. Speed and accuracy meet in it."""
    facts = row.evaluator
    view = facts.get("view") or (facts.get("data") or {}).get("view") or {}
    acceleration = {name: value for name, value in (facts.get("acceleration") or {}).items() if value}
    how = [facts.get("image_size") or view.get("size"), acceleration, facts.get("precision")]
    return row.checkpoint_sha256, json.dumps(how, sort_keys=True)


def _setting(row: ResultRow, common: set[str]) -> dict[str, Any]:
    """What tells one measurement of speed from another; a variant's words name most of it, but for `common` ones."""
    if not row.variant:
        return row.evaluator
    kept: dict[str, Any] = {
        name: row.evaluator[name] for name in ("precision", "device") if name in row.evaluator
    }
    return {"variant": " ".join(word for word in row.variant.split() if word not in common), **kept}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that puts `64px` before `128px`."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """For each config the leaves in which not all agree, as text; empty where all are alike."""
    flat = [dict(_leaves(config)) for config in configs]
    names = list(dict.fromkeys(name for leaves in flat for name in leaves))
    differ = [n for n in names if len({json.dumps(leaves.get(n), sort_keys=True) for leaves in flat}) > 1]
    return [
        " · ".join(_told(n, leaves[n]) for n in differ if leaves.get(n) not in (None, "")) for leaves in flat
    ]


def _told(name: str, value: Any) -> str:
    return _text(value) if name in ("variant", "device") else f"{name.rsplit('.', 1)[-1]} {_text(value)}"


def _leaves(config: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(config, dict):
        return [
            leaf for key, value in config.items() for leaf in _leaves(value, f"{path}.{key}" if path else key)
        ]
    return [(path, config)]


def _marks(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events as traces along the foot of a chart, one for each kind of event."""
    marks: dict[str, dict[str, Any]] = {}
    for entry in found[-POINTS:]:
        if _finite(entry["step"]):
            trace = marks.setdefault(entry["event"], {"name": entry["event"], "x": [], "text": []})
            trace["x"].append(entry["step"])
            trace["text"].append(entry["details"][:200])
    return list(marks.values())


def _head(name: str) -> str:
    return "total" if name == "loss" else name.removeprefix("loss_")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _scaled(value: Any, factor: float) -> float | None:
    """None for what is no finite number (NaN is written as text): the curve has a gap there."""
    return float(f"{value * factor:.6g}") if _finite(value) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
