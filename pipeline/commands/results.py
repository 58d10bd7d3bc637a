"""`itpn results …`: what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import typer
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, err, guarded, root_of
from pipeline.commands.compare import results_compare
from pipeline.commands.lineage import print_lineage
from pipeline.registry import Registry, Rows
from pipeline.registry.lineage import lineage
from pipeline.registry.metrics import METRICS, measure, way
from pipeline.registry.metrics import unit as unit_of
from pipeline.registry.rows import result_rows, select
from stages.config import nearest

app = typer.Typer(help="Results in the registry.", no_args_is_help=True)
SHOWN = "id,created_at,run,dataset,split,metric,value,variant,init,seed,step"
WhereOpt = Annotated[
    list[str], typer.Option("--where", metavar="CONDITION", help="FIELD OP VALUE; OP is = != < <= > >= or ~.")
]


@app.command("list")
@guarded
def results_list(
    root: RootOpt = "",
    metric: Annotated[str | None, typer.Option(help="Only this metric.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only this data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
    init: Annotated[str | None, typer.Option(help="Only pretrained or scratch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed.")] = None,
    run_name: Annotated[str | None, typer.Option("--run", help="Only this recipe.")] = None,
    where: WhereOpt = [],  # noqa: B006  (typer copies it)
    sort: Annotated[str | None, typer.Option(help="Field to sort by; -FIELD for descending.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    columns: Annotated[str, typer.Option(help="Fields of the table and the CSV.")] = SHOWN,
    from_view: Annotated[
        bool,
        typer.Option("--view", help="Read only the Delta view, as of its last sync: no look for newer ones."),
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on stdout.")] = False,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all fields to a Parquet file.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """All results, oldest first.

    [bold]Examples[/]

      itpn results list --root runs/demo --metric top1 --json

      itpn results list --root runs/demo --where 'value>=80' --where step~pretrained --sort -value --csv
    """
    uri = storage.join(root_of(root))
    equal = {
        "metric": metric,
        "dataset": dataset,
        "split": split,
        "init": init,
        "seed": seed,
        "run": run_name,
    }
    everything = _table(uri, from_view)
    table = select(everything, where, equal=equal, sort=sort, limit=limit)
    names = _columns(columns, table)
    if parquet:
        import pyarrow.parquet as pq

        pq.write_table(table, parquet)
        err.print(f"{len(table)} rows in {parquet}", markup=False)
    if as_json:
        rows = table.to_pylist()
        for row in rows:
            row["evaluator"] = json.loads(row["evaluator"])
        view.print_json({"ok": True, "root": uri, "results": rows})
    elif as_csv:
        import sys

        import pyarrow.csv

        pyarrow.csv.write_csv(table.select(names), sys.stdout.buffer)
    elif parquet:
        return
    elif len(table):
        console_of(False).print(_rich_table(table.select(names)))
    elif len(everything):
        err.print(f"none of the {len(everything)} results under {uri} is like that", markup=False)
    else:
        err.print(f"no results under {uri}; `itpn run demo --root {root}` makes some", markup=False)


@app.command("show")
@guarded
def results_show(
    result: Annotated[str, typer.Argument(help="Start of a result's id (see list).")],
    root: RootOpt = "",
    as_json: JsonOpt = False,
) -> None:
    """One result and everything it was made from.

    [bold]Example[/]: itpn results show 3f2a --root runs/demo
    """
    registry = Registry(root_of(root))
    table = registry.results_table()
    hits = result_rows(table.filter(pc.starts_with(table["id"], result)))
    if len(hits) != 1:
        raise ConfigError(
            f"'{result}' begins the id of {len(hits)} results", expected="one", remedy="itpn results list"
        )
    row = {"id": hits[0].id, **hits[0].model_dump(mode="json")}
    origin = lineage(registry.root, hits[0].step)
    if as_json:
        view.print_json({"ok": True, "root": registry.root, "result": row, "lineage": origin})
        return
    console = console_of(False)
    for key, value in row.items():
        told = _with_unit(row["metric"], value) if key == "value" else value
        console.print(Text(f"{key:<22}{told}"), soft_wrap=True)
    console.print()
    print_lineage(console, origin)


@app.command("best")
@guarded
def results_best(
    root: RootOpt = "",
    metric: Annotated[str, typer.Option(help="Metric to judge by.")] = "top1",
    dataset: Annotated[str | None, typer.Option(help="Only this data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
    evaluated: Annotated[
        str | None,
        typer.Option(
            metavar="FINGERPRINT", help="Only measured on these data: start of evaluated_fingerprint."
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="The best of each value of this field, e.g. init, run; on each data.")
    ] = None,
    lower_is_better: Annotated[
        bool | None,
        typer.Option(
            "--lower-is-better/--higher-is-better", help="For a metric whose direction is not known."
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """The best result of a metric. Values of different data are never compared.

    [bold]Examples[/]

      itpn results best --root runs/demo --metric top1

      itpn results best --root runs/demo --metric top1 --by init

      itpn results best --root runs/demo --metric my_error --lower-is-better
    """
    uri = storage.join(root_of(root))
    registry = Registry(uri)
    equal = {"dataset": dataset, "split": split}
    if evaluated is not None:
        equal["evaluated_fingerprint"] = _fingerprint(registry, metric, evaluated)
    if by:
        rows = registry.best_of_each(metric, by, lower_is_better=lower_is_better, **equal)
    else:
        rows = Rows([registry.best(metric, lower_is_better=lower_is_better, **equal)], "results")
    if as_json:
        found = [row.model_dump(mode="json") for row in rows]
        view.print_json({"ok": True, "root": uri, "best": found if by else found[0]})
    else:
        console_of(False).print(view.rows_table(rows))


app.command("compare")(results_compare)


@app.command("export")
@guarded
def results_export(
    root: RootOpt = "",
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="Tracking server (http://…), or sqlite:///FILE.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Local folder for event files.")
    ] = None,
    run_name: Annotated[str | None, typer.Option("--run", help="Only this recipe.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show the results to MLflow or TensorBoard; doing it again adds only what is new.

    [bold]Examples[/]

      itpn results export --mlflow sqlite:///mlflow.db --root runs/demo

      itpn results export --tensorboard runs/demo-results --root runs/demo
    """
    from pipeline.registry import exports

    if mlflow is None and tensorboard is None:
        raise ConfigError(
            "nothing says where to export to", remedy="--mlflow URI or --tensorboard DIR, or both"
        )
    registry = Registry(root_of(root))
    rows = registry.results(run=run_name)
    found: dict[str, int] = {}
    if tensorboard is not None:
        found["tensorboard"] = exports.to_tensorboard(registry, rows, tensorboard)
    if mlflow is not None:
        found["mlflow"] = exports.to_mlflow(registry, rows, mlflow)
    what = {"tensorboard": f"event files under {tensorboard}", "mlflow": f"metrics at {mlflow}"}
    for name, count in found.items():
        console_of(as_json).print(Text(f"{count} new {what[name]}, of {len(rows)} results"), soft_wrap=True)
    if as_json:
        view.print_json({"ok": True, "root": registry.root, "results": len(rows), "new": found})


def _table(uri: str, from_view: bool) -> pa.Table:
    from pipeline.registry import delta

    return delta.read(uri, "results") if from_view else delta.current(uri, "results")


def _columns(text: str, table: pa.Table) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in table.column_names:
            raise ConfigError(f"results have no field '{name}'", remedy=nearest(name, table.column_names))
    return names


def _rich_table(table: pa.Table) -> Table:
    shown = Table()
    for name in table.column_names:
        number = pa.types.is_floating(table.schema.field(name).type) or name == "seed"
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in table.to_pylist():
        shown.add_row(*(Text(_text(name, value)) for name, value in row.items()))
    return shown


def _text(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name in ("id", "checkpoint_sha256"):
        return value[:10]
    return value[:19] if name == "created_at" else f"{value:.5g}" if isinstance(value, float) else str(value)


def _with_unit(metric: str, value: float) -> str:
    """A value as it is stored, and what is known of its metric."""
    if metric not in METRICS:
        return f"{value}  (nobody knows which way is better)"
    written = "" if METRICS[metric].factor == 1.0 else f" = {measure(value, metric)}"
    return f"{value}{written} {unit_of(metric)}".rstrip() + f"  ({way(METRICS[metric].lower)} is better)"


def _fingerprint(registry: Registry, metric: str, start: str) -> str:
    """The one evaluated_fingerprint of a metric's results that begins so."""
    known = set(registry.results_table(metric=metric)["evaluated_fingerprint"].to_pylist()) - {None}
    hits = sorted(name for name in known if name.startswith(start))
    if len(hits) != 1:
        raise ConfigError(
            f"'{start}' begins the fingerprint of {len(hits)} data that '{metric}' was measured on",
            expected="one",
            found=", ".join(sorted(known)) or "none",
        )
    return hits[0]
