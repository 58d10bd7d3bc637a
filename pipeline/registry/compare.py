"""Groups of results side by side: differences, the spread over seeds, and what differs in config and data."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import ConfigError, NotFound
from pipeline.record import Record, differences
from pipeline.registry.aliases import Aliases
from pipeline.registry.evaluated import DATA_FIELDS, clashing, data_names
from pipeline.registry.lineage import read_record
from pipeline.registry.metrics import known_direction
from pipeline.registry.rows import select
from pipeline.registry.store import Registry
from stages.config import nearest

THREADS = 16


def group(registry: Registry, table: pa.Table, name: str) -> pa.Table:
    """The results that `name` means: an alias, a run, a step (of evaluation), the start of a checkpoint's sha256,
    or `field=value[,field=value…]`. Raises ConfigError when it means none."""
    if "=" in name:
        pairs = [part.partition("=")[::2] for part in name.split(",")]
        found = table
        for key, value in pairs:
            if value == "None" and key in found.column_names:
                found = found.filter(pc.is_null(found[key]))
            else:
                found = select(found, equal={key: value})
    else:
        alias = Aliases(registry).all().get(name)
        sha256 = alias.current.checkpoint_sha256 if alias else name
        exact = (pc.equal(table[key], value) for key, value in (("run", name), ("step", name)))
        found = table.filter(pc.or_(pc.or_(*exact), pc.equal(table["checkpoint_sha256"], sha256)))
        if not len(found) and len(name) >= 6:
            found = table.filter(pc.starts_with(table["checkpoint_sha256"], name))
    if not len(found) and "=" in name:
        values = {key: sorted(map(str, set(table[key].to_pylist()))) for key, _ in pairs}
        wrong = [_few(value, values[key]) for key, value in pairs if value not in values[key]]
        raise ConfigError(
            f"no result has {' and '.join(name.split(','))}", remedy="; ".join(wrong) or "itpn results list"
        )
    if not len(found):
        known = {*table["step"].unique().to_pylist(), *table["run"].unique().to_pylist()}
        raise ConfigError(
            f"no result belongs to '{name}'",
            expected="an alias, a run, a step, the start of a checkpoint's sha256, or FIELD=VALUE[,…]",
            remedy=_few(name, sorted(known)),
        )
    return found


def compare(registry: Registry, names: list[str]) -> dict[str, Any]:
    """Compare groups of results with the first of them, JSON-ready.

    `metrics`: for each data, metric and variant, every group's mean, sample standard deviation over its rows (seeds;
    None for one row) and number of rows, and for the later groups `delta` to the first, `better` (None for a metric
    whose direction nobody knows), and `clear`: whether the difference exceeds the standard error of the two means twice
    (None with one row). Equal names of different data are different lines; `data` on the line tells them apart.
    `evaluated_differ`: the names under which there are different data.
    `config`: leaves that differ between the training steps; a value that varies inside a group is a list of its values.
    `data`: each group's fingerprints of training data.
    """
    table = registry.results_table()
    groups = [group(registry, table, name) for name in names]
    cells: dict[tuple[Any, ...], list[list[float]]] = defaultdict(lambda: [[] for _ in names])
    fields = [*DATA_FIELDS, "metric", "variant", "value"]
    for index, members in enumerate(groups):
        for row in zip(*(members[field].to_pylist() for field in fields), strict=True):
            cells[row[:-1]][index].append(row[-1])
    told = data_names((place[0], place[1], place[2]) for place in cells)
    metrics = []
    for place, values in sorted(cells.items(), key=lambda cell: [part or "" for part in cell[0]]):
        dataset, split, evaluated, metric, variant = place
        facts = [_facts(v) for v in values]
        for fact in facts[1:]:
            fact |= _delta(facts[0], fact, metric)
        about = {"dataset": dataset, "split": split, "metric": metric, "variant": variant}
        about |= {"evaluated_fingerprint": evaluated, "data": told[dataset, split, evaluated]}
        metrics.append({**about, "groups": facts})
    return {
        "groups": names,
        "metrics": metrics,
        "evaluated_differ": clashing(told),
        "config": _config_diff(registry, groups),
        "data": [sorted(members["data_fingerprint"].unique().to_pylist()) for members in groups],
    }


def _few(name: str, known: list[str]) -> str:
    """`nearest`, without a list of thousands."""
    text = nearest(name, known)
    return text if len(text) < 400 else text[:400].rpartition(",")[0] + ", …; itpn results list"


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
    lower = known_direction(metric)
    better = None if delta == 0 or lower is None else (delta < 0) == lower
    clear = None
    if first["std"] is not None and fact["std"] is not None:
        error = (first["std"] ** 2 / first["rows"] + fact["std"] ** 2 / fact["rows"]) ** 0.5
        clear = abs(delta) > 2 * error
    return {"delta": delta, "better": better, "clear": clear}


def _config_diff(registry: Registry, groups: list[pa.Table]) -> list[dict[str, Any]]:
    leaves: list[dict[str, list[Any]]] = []
    for members in groups:
        found: dict[str, list[Any]] = defaultdict(list)
        steps = sorted(members["step"].unique().to_pylist())
        with ThreadPoolExecutor(THREADS) as pool:
            configs = list(pool.map(lambda step: training_config(registry, step), steps))
        for config in configs:
            for path, _, value in differences({}, config):
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
        return leaves_of(found)
    except (NotFound, KeyError):
        return {"record": f"that of {step}, or one before it, is gone"}


def leaves_of(value: Any, path: str = "") -> dict[str, Any]:
    """The values of nested dicts by their paths: `{"a": {"b": 1}}` → `{"a.b": 1}`."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= leaves_of(inner, f"{path}.{key}" if path else key)
    return found
