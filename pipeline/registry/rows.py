"""Result rows as a list that becomes a data frame, an Arrow table or a CSV, and the choosing among them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import ConfigError
from pipeline.registry.events import CheckpointRow, Event, ResultRow
from stages.config import nearest

if TYPE_CHECKING:
    import pandas

Row = TypeVar("Row", bound=Event)

_EVENT = [("id", pa.string()), ("schema_version", pa.int64()), ("run", pa.string()), ("step", pa.string())]
_END = [("code_version", pa.string()), ("created_at", pa.string())]
RESULTS = pa.schema(
    [
        *_EVENT,
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("samples", pa.int64()),
        ("init", pa.string()),
        ("seed", pa.int64()),
        ("variant", pa.string()),
        ("evaluator", pa.string()),  # JSON
        ("evaluator_fingerprint", pa.string()),
        ("evaluated_fingerprint", pa.string()),
        ("checkpoint", pa.string()),
        ("checkpoint_sha256", pa.string()),
        ("model_fingerprint", pa.string()),
        ("pretrain", pa.string()),
        ("training_fingerprint", pa.string()),
        ("data_fingerprint", pa.string()),
        *_END,
    ]
)
CHECKPOINTS = pa.schema(
    [
        *_EVENT,
        ("fingerprint", pa.string()),
        ("checkpoint", pa.string()),
        ("checkpoint_sha256", pa.string()),
        ("bytes", pa.int64()),
        ("task", pa.string()),
        ("dataset", pa.string()),
        ("data_fingerprint", pa.string()),
        ("seed", pa.int64()),
        ("init", pa.string()),
        ("pretrain", pa.string()),
        ("teacher_sha256", pa.string()),
        ("optimiser_steps", pa.int64()),
        ("metrics", pa.string()),  # JSON
        *_END,
    ]
)
RUNS = pa.schema(
    [
        *_EVENT,
        ("fingerprint", pa.string()),
        ("outcome", pa.string()),
        ("error", pa.string()),
        ("exit_code", pa.int64()),
        ("host", pa.string()),
        ("wall_s", pa.float64()),
        ("gpu_seconds", pa.float64()),
        *_END,
    ]
)
DELETIONS = pa.schema(
    [
        *_EVENT,
        ("checkpoint", pa.string()),
        ("checkpoint_sha256", pa.string()),
        ("bytes", pa.int64()),
        ("why", pa.string()),
        ("by", pa.string()),
        ("host", pa.string()),
        *_END,
    ]
)
SCHEMAS: dict[str, pa.Schema] = {
    "results": RESULTS,
    "checkpoints": CHECKPOINTS,
    "runs": RUNS,
    "deletions": DELETIONS,
}


class Rows(list[Row], Generic[Row]):
    """Events of one kind, oldest first."""

    def __init__(self, rows: Iterable[Row], kind: str) -> None:
        super().__init__(rows)
        self.kind = kind

    def to_arrow(self) -> pa.Table:
        """One row each, with the event's id; nested values are JSON text."""
        return pa.Table.from_pylist([flat(row) for row in self], schema=SCHEMAS[self.kind])

    def to_pandas(self) -> pandas.DataFrame:
        """The same as a data frame."""
        return self.to_arrow().to_pandas()


def flat(row: Event) -> dict[str, Any]:
    """One event as a row of its table."""
    found = {"id": row.id, **row.model_dump(mode="json")}
    if isinstance(row, ResultRow):
        found["evaluator"] = json.dumps(found["evaluator"], sort_keys=True)
    if isinstance(row, CheckpointRow):
        reference = found["checkpoint"]
        found |= {k: reference[k] for k in ("bytes", "task", "dataset", "data_fingerprint", "seed", "init")}
        found |= {"pretrain": reference["pretrain"], "teacher_sha256": reference["teacher_sha256"]}
        found |= {"checkpoint": reference["uri"], "checkpoint_sha256": reference["sha256"]}
        found |= {"optimiser_steps": reference["step"]}
        found["metrics"] = json.dumps(found["metrics"], sort_keys=True)
    return found


def result_rows(table: pa.Table) -> Rows[ResultRow]:
    """The events behind a table of results, in its order."""
    found = table.drop_columns(["id"]).to_pylist()
    return Rows(
        (ResultRow.model_validate(row | {"evaluator": json.loads(row["evaluator"])}) for row in found),
        "results",
    )


def first_of_each(table: pa.Table, keys: Sequence[str], *, lower: bool) -> pa.Table:
    """The best result of each combination of the fields `keys`, in no order; the oldest among equals.

    The model as it was trained goes before variants of it (other labels, resolution, acceleration), whatever
    their values.
    """
    table = table.append_column("_varied", pc.not_equal(table["variant"], ""))
    order = "ascending" if lower else "descending"
    ages = [(name, "ascending") for name in ("created_at", "step", "id")]
    table = table.sort_by([("_varied", "ascending"), ("value", order), *ages])
    table = table.append_column("_place", pa.array(range(len(table)), pa.int64()))
    firsts = table.group_by(list(keys)).aggregate([("_place", "min")])["_place_min"]
    return table.take(firsts).drop_columns(["_varied", "_place"])


_OPERATORS = {
    "!=": pc.not_equal,
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    "=": pc.equal,
    ">": pc.greater,
    "<": pc.less,
    "~": lambda column, value: pc.match_substring(column, value.as_py()),
}
_CONDITION = re.compile(r"^\s*(\w+)\s*(!=|>=|<=|=|>|<|~)\s*(.*?)\s*$")


def select(
    table: pa.Table,
    where: Sequence[str] = (),
    *,
    equal: dict[str, Any] | None = None,
    sort: str | None = None,
    limit: int | None = None,
) -> pa.Table:
    """Filter, sort and cut a table of events.

    Args:
        where: conditions that all hold: `field=value`, `!=`, `<`, `<=`, `>`, `>=`, or `field~text` (contains).
        equal: further fields and their values; None is any.
        sort: a field, `-field` for descending; by default oldest first.
        limit: keep this many: the first ones of the sort, or the newest where no sort is given.

    Raises ConfigError for a field that rows do not have, or a condition that cannot be read.
    """
    for condition in where:
        match = _CONDITION.match(condition)
        if not match:
            raise ConfigError(
                f"'{condition}' is no condition", expected="FIELD OP VALUE, OP one of = != < <= > >= ~"
            )
        table = _keep(table, *match.groups())
    for name, value in (equal or {}).items():
        if value is not None:
            text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
            table = _keep(table, name, "=", text)
    if sort:
        name, order = sort.lstrip("-"), "descending" if sort.startswith("-") else "ascending"
        _field(table, name)
        table = table.sort_by([(name, order), ("created_at", "ascending"), ("id", "ascending")])
        return table.slice(0, limit) if limit else table
    keys = [name for name in ("created_at", "step", "metric", "id") if name in table.column_names]
    table = table.sort_by([(name, "ascending") for name in keys])
    return table.slice(max(len(table) - limit, 0)) if limit else table


def _keep(table: pa.Table, name: str, operator: str, text: str) -> pa.Table:
    field = _field(table, name)
    kind = pa.string() if operator == "~" else field.type
    column = table[name].cast(kind) if operator == "~" else table[name]
    try:
        value = pa.scalar(text).cast(kind)
    except pa.ArrowInvalid:
        raise ConfigError(f"'{text}' is no value of '{name}'", expected=str(field.type)) from None
    return table.filter(pc.fill_null(_OPERATORS[operator](column, value), operator == "!="))


def _field(table: pa.Table, name: str) -> pa.Field:
    if name not in table.column_names:
        raise ConfigError(f"rows have no field '{name}'", remedy=nearest(name, table.column_names))
    return table.schema.field(name)
