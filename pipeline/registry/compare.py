"""Groups of results side by side: differences, the spread over seeds, and what differs in config and data."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, stdev
from typing import Any

from cluster.errors import ConfigError, NotFound
from pipeline.record import Record, differences
from pipeline.registry.aliases import Aliases
from pipeline.registry.events import ResultRow
from pipeline.registry.lineage import read_record
from pipeline.registry.store import LOWER_IS_BETTER, Registry
from stages.config import nearest


def group(registry: Registry, rows: list[ResultRow], name: str) -> list[ResultRow]:
    """The rows that `name` means: an alias, a run, a step (of evaluation), the start of a checkpoint's sha256,
    or `field=value[,field=value…]`. Raises ConfigError when it means none."""
    if "=" in name:
        wanted = [part.partition("=")[::2] for part in name.split(",")]
        for key, _ in wanted:
            if key not in ResultRow.model_fields:
                raise ConfigError(
                    f"results have no field '{key}'", remedy=nearest(key, list(ResultRow.model_fields))
                )
        found = [r for r in rows if all(str(getattr(r, key)) == value for key, value in wanted)]
    else:
        alias = Aliases(registry).all().get(name)
        sha256 = alias.current.checkpoint_sha256 if alias else name
        found = [r for r in rows if name in (r.run, r.step) or sha256 == r.checkpoint_sha256]
        if not found and len(name) >= 6:
            found = [r for r in rows if r.checkpoint_sha256.startswith(name)]
    if not found:
        raise ConfigError(
            f"no result belongs to '{name}'",
            expected="an alias, a run, a step, the start of a checkpoint's sha256, or FIELD=VALUE[,…]",
            remedy=nearest(name, sorted({r.step for r in rows} | {r.run for r in rows})),
        )
    return found


def compare(registry: Registry, names: list[str]) -> dict[str, Any]:
    """Compare groups of results with the first of them, JSON-ready.

    `metrics`: for each data set, split, metric and variant, every group's mean, sample standard deviation over its rows
    (seeds; None for one row) and number of rows, and for the later groups `delta` to the first, `better`, and
    `clear`: whether the difference exceeds the standard error of the two means twice (None with one row).
    `config`: leaves that differ between the training steps; a value that varies inside a group is a list of its values.
    `data`: each group's fingerprints of training data.
    """
    rows = registry.results()
    groups = [group(registry, rows, name) for name in names]
    cells: dict[tuple[str, str, str, str], list[list[float]]] = defaultdict(lambda: [[] for _ in names])
    for index, members in enumerate(groups):
        for row in members:
            cells[row.dataset, row.split, row.metric, row.variant][index].append(row.value)
    metrics = []
    for (dataset, split, metric, variant), values in sorted(cells.items()):
        facts = [_facts(v) for v in values]
        for fact in facts[1:]:
            fact |= _delta(facts[0], fact, metric)
        about = {"dataset": dataset, "split": split, "metric": metric, "variant": variant}
        metrics.append({**about, "groups": facts})
    return {
        "groups": names,
        "metrics": metrics,
        "config": _config_diff(registry, groups),
        "data": [sorted({r.data_fingerprint for r in members}) for members in groups],
    }


def _facts(values: list[float]) -> dict[str, Any]:
    return {
        "mean": mean(values) if values else None,
        "std": stdev(values) if len(values) > 1 else None,
        "rows": len(values),
    }


def _delta(first: dict[str, Any], fact: dict[str, Any], metric: str) -> dict[str, Any]:
    if first["mean"] is None or fact["mean"] is None:
        return {"delta": None, "better": None, "clear": None}
    delta = fact["mean"] - first["mean"]
    better = None if delta == 0 else (delta < 0) == (metric in LOWER_IS_BETTER)
    clear = None
    if first["std"] is not None and fact["std"] is not None:
        error = (first["std"] ** 2 / first["rows"] + fact["std"] ** 2 / fact["rows"]) ** 0.5
        clear = abs(delta) > 2 * error
    return {"delta": delta, "better": better, "clear": clear}


def _config_diff(registry: Registry, groups: list[list[ResultRow]]) -> list[dict[str, Any]]:
    leaves: list[dict[str, list[Any]]] = []
    for members in groups:
        found: dict[str, list[Any]] = defaultdict(list)
        for step in sorted({r.step for r in members}):
            for path, _, value in differences({}, training_config(registry, step)):
                if value not in found[path]:
                    found[path].append(value)
        leaves.append(found)
    diff: list[dict[str, Any]] = []
    stages: list[set[str]] = [{path.partition(".")[0] for path in found} for found in leaves]
    partial = {s for found in stages for s in found if not all(s in other for other in stages)}
    for stage in sorted(
        partial
    ):  # a whole stage that some did not go through is one difference, not a hundred
        diff.append({"field": stage, "values": ["has one" if stage in s else None for s in stages]})
    leaves = [{k: v for k, v in f.items() if k.partition(".")[0] not in partial} for f in leaves]
    for path in sorted(set().union(*leaves)):
        values = [found.get(path, []) for found in leaves]
        if any(v != values[0] for v in values[1:]):
            diff.append({"field": path, "values": [v[0] if len(v) == 1 else v or None for v in values]})
    return diff


def training_config(registry: Registry, step: str) -> dict[str, Any]:
    """The configs that an evaluation's weights were trained with: of its checkpoint's step and of that one's `init`.

    Records that are gone are told as such, in the place of the config.
    """
    try:
        record: Record = read_record(registry.root, step)
        trained = read_record(registry.root, record.inputs["checkpoint"].step)
        found = {"evaluate": record.identity["config"], "train": trained.identity["config"]}
        if "init" in trained.inputs:
            found["init"] = read_record(registry.root, trained.inputs["init"].step).identity["config"]
        return _leaves(found)
    except (NotFound, KeyError):
        return {"record": f"that of {step}, or one before it, is gone"}


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _leaves(inner, f"{path}.{key}" if path else key)
    return found
