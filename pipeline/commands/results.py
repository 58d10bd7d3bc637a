"""`itpn results …`: what was measured."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from cluster import storage
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, err, guarded, root_of
from pipeline.registry import Registry

app = typer.Typer(help="Results in the registry.", no_args_is_help=True)


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
    as_json: JsonOpt = False,
) -> None:
    """All results, oldest first.

    [bold]Example[/]: itpn results list --root runs/demo --metric top1 --json
    """
    uri = storage.join(root_of(root))
    rows = Registry(uri).results(
        metric=metric, dataset=dataset, split=split, init=init, seed=seed, run=run_name
    )
    if as_json:
        view.print_json({"ok": True, "root": uri, "results": [row.model_dump(mode="json") for row in rows]})
    elif rows:
        Console().print(view.rows_table(rows))
    else:
        err.print(f"no results under {uri}; `itpn run demo --root {root}` makes some")


@app.command("best")
@guarded
def results_best(
    root: RootOpt = "",
    metric: Annotated[str, typer.Option(help="Metric to judge by.")] = "top1",
    dataset: Annotated[str | None, typer.Option(help="Only this data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """The best result of a metric.

    [bold]Example[/]: itpn results best --root runs/demo --metric top1
    """
    uri = storage.join(root_of(root))
    row = Registry(uri).best(metric, dataset=dataset, split=split)
    if as_json:
        view.print_json({"ok": True, "root": uri, "best": row.model_dump(mode="json")})
    else:
        Console().print(view.rows_table([row]))
