"""`itpn results …`: what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, err, guarded, root_of
from pipeline.registry import Registry, Rows
from pipeline.registry import compare as comparing
from pipeline.registry.compare import leaves_of
from pipeline.registry.lineage import lineage
from pipeline.registry.metrics import METRICS, measure, way
from pipeline.registry.metrics import unit as unit_of
from pipeline.registry.rows import result_rows, select
from pipeline.written import duration, size
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


@app.command("compare")
@guarded
def results_compare(
    groups: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: an alias, a run, a step, a checkpoint's sha256, or FIELD=VALUE,FIELD=VALUE."
        ),
    ],
    root: RootOpt = "",
    as_json: JsonOpt = False,
) -> None:
    """Groups of results side by side: differences, the spread over seeds, configs, data.

    [bold]Example[/]: itpn results compare init=scratch init=pretrained --root runs/demo
    """
    if len(groups) < 2:
        raise ConfigError("compare needs two groups or more", found=f"only '{groups[0]}'")
    registry = Registry(root_of(root))
    found = comparing.compare(registry, groups)
    if as_json:
        view.print_json({"ok": True, "root": registry.root, **found})
        return
    table = Table()
    for heading in ("data", "metric", *groups):
        table.add_column(Text(heading), justify="left" if heading in ("data", "metric") else "right")
    for line in found["metrics"]:
        cells = [Text(_cell(fact, line["metric"])) for fact in line["groups"]]
        unit = f" ({unit_of(line['metric'])})" if unit_of(line["metric"]) else ""
        table.add_row(Text(line["data"]), Text(f"{line['metric']}{unit} {line['variant']}".rstrip()), *cells)
    console = console_of(False)
    console.print(table)
    for name in found["evaluated_differ"]:
        text = (
            f"evaluated data differ: not everything was measured on the same {name}, so it has several lines"
        )
        console.print(Text(text), soft_wrap=True)
    same = all(data == found["data"][0] for data in found["data"])
    console.print("training data: the same" if same else "training data differ:")
    for name, fingerprints in zip(groups, found["data"], strict=True):
        if not same:
            console.print(Text(f"  {name}: {', '.join(f[:12] for f in fingerprints)}"))
    console.print("config: no differences" if not found["config"] else "config differs:")
    for line in found["config"]:
        console.print(Text(f"  {line['field']}: " + "  |  ".join(map(str, line["values"]))), soft_wrap=True)


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


def print_lineage(console: Console, node: dict[str, Any], role: str = "", depth: int = 0) -> None:
    """The tree of `lineage`: each step with what it made, its size, metrics and config, then its inputs."""
    pad = "  " * depth
    name = f"{role + ': ' if role else ''}{node['step']}"
    if node.get("missing"):
        console.print(Text(f"{pad}{name}  (its record is gone)"))
        return
    head = f"{pad}{name}  {node['finished_at'][:19]}  {duration(node['wall_s'])}  code {node['code_version']}"
    console.print(Text(head), soft_wrap=True)
    for key in ("checkpoint", "dataset"):
        if facts := node.get(key):
            uri = facts.get("uri") or facts["manifest"]
            bytes_ = f"  {size(facts['bytes'])}" if "bytes" in facts else ""
            console.print(Text(f"{pad}    {uri}{bytes_}  sha256 {facts['sha256'][:16]}"), soft_wrap=True)
            if facts.get("teacher_sha256"):
                console.print(Text(f"{pad}    teacher sha256 {facts['teacher_sha256'][:16]}"))
            if facts.get("fingerprint"):
                console.print(Text(f"{pad}    content {facts['fingerprint'][:16]}, splits {facts['splits']}"))
    metrics = [
        f"{name} {measure(value, name)} {unit_of(name)}".rstrip() for name, value in node["metrics"].items()
    ]
    config = [f"{path}={_short(value)}" for path, value in sorted(leaves_of(node["config"]).items())]
    for what, told in (("metrics", metrics), ("config", config)):
        if told:
            first, rest = f"{pad}    {what}: ", pad + " " * 8
            for line in wrap(
                ", ".join(told), console.width, initial_indent=first, subsequent_indent=rest, **_WRAP
            ):
                console.print(Text(line), soft_wrap=True)
    for name, needed in node["inputs"].items():
        print_lineage(console, needed, name, depth + 1)


_WRAP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _short(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


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


def _cell(fact: dict[str, Any], metric: str) -> str:
    if fact["mean"] is None:
        return "–"
    factor = METRICS[metric].factor if metric in METRICS else 1.0
    text = f"{fact['mean'] * factor:.4g}" + (
        f" ± {fact['std'] * factor:.2g} ({fact['rows']})" if fact["std"] is not None else ""
    )
    if fact.get("delta") is not None:
        judged = {True: " better", False: " worse", None: ""}[fact["better"]]
        sure = {True: "", False: " within the spread", None: ", spread unknown"}[fact["clear"]]
        text += f"  [{fact['delta'] * factor:+.4g}{judged if fact['clear'] is not False else ''}{sure}]"
    return text


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
