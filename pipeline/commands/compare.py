"""`itpn results compare`: groups of results side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded, root_of
from pipeline.registry import Registry
from pipeline.registry.compare import compare
from pipeline.registry.metrics import METRICS, unit


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
    found = compare(registry, groups)
    if as_json:
        view.print_json({"ok": True, "root": registry.root, **found})
        return
    table = Table()
    for heading in ("data", "metric", *groups):
        table.add_column(Text(heading), justify="left" if heading in ("data", "metric") else "right")
    for line in found["metrics"]:
        cells = [Text(_cell(fact, line["metric"])) for fact in line["groups"]]
        told = f" ({unit(line['metric'])})" if unit(line["metric"]) else ""
        table.add_row(Text(line["data"]), Text(f"{line['metric']}{told} {line['variant']}".rstrip()), *cells)
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


def _cell(fact: dict[str, Any], metric: str) -> str:
    if fact["mean"] is None:
        return "–"
    factor = METRICS[metric].factor if metric in METRICS else 1.0
    text = f"{fact['mean'] * factor:.4g}" + (
        f" ± {fact['std'] * factor:.2g} ({fact['rows']})" if fact["std"] is not None else ""
    )
    if fact.get("delta") == 0:
        text += "  [equal]"
    elif fact.get("delta") is not None:
        judged = {True: " better", False: " worse", None: ""}[fact["better"]]
        sure = {True: "", False: " within the spread", None: ", spread unknown"}[fact["clear"]]
        text += f"  [{fact['delta'] * factor:+.4g}{judged if fact['clear'] is not False else ''}{sure}]"
    return text
