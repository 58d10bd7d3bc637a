"""`itpn results table`: what the jobs of a recipe came to, by what they vary, with mean and spread over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import ConfigError
from pipeline import record as records
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, err, guarded, root_of
from pipeline.commands.run import SetOpt, recipe_of
from pipeline.registry import ResultRow, results_of
from pipeline.registry.evaluated import data_names, data_of
from pipeline.registry.metrics import unit
from pipeline.step import Step, topological
from stages.config import nearest

Values = dict[int, float]  # by seed


@guarded
def table(
    recipe: Annotated[str, typer.Argument(help="The recipe whose jobs are compared.")],
    root: RootOpt = "",
    metric: Annotated[str, typer.Option(help="What is shown.")] = "top1",
    across: Annotated[str, typer.Option(metavar="AXIS", help="This axis as columns, e.g. checkpoint.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    set_: SetOpt = [],  # noqa: B006  (typer copies it)
    as_json: JsonOpt = False,
) -> None:
    """A recipe's results by what its jobs vary: mean ± standard deviation over the seeds (their number).

    [bold]Example[/]: itpn results table demo_table --root runs/demo --across checkpoint --markdown
    """
    module, config = recipe_of(recipe, set_)
    uri = storage.join(root_of(root))
    steps = [step for step in topological(module.build(config)) if step.kind == "evaluate"]
    groups, missing = gather(uri, steps, metric)
    if not groups:
        raise ConfigError(
            f"no job of '{recipe}' has a result '{metric}'",
            found=f"{len(steps) - len(missing)} of {len(steps)} evaluations done",
            remedy=f"itpn run {recipe} --root {root}, or another --metric",
        )
    axes = list(dict.fromkeys(axis for labels in groups for axis, _ in labels))
    if across and across not in axes:
        raise ConfigError(f"the jobs have no axis '{across}'", remedy=nearest(across, axes))
    if as_json:
        found = [dict(labels) | summary(values) for labels, values in groups.items()]
        view.print_json(
            {"ok": True, "root": uri, "recipe": recipe, "metric": metric, "rows": found, "missing": missing}
        )
        return
    heading, lines = _lines(groups, [axis for axis in axes if axis != across], across)
    if markdown:
        for cells in (heading, ["---"] * len(heading), *lines):
            print("| " + " | ".join(cells) + " |")
    else:
        shown = Table(title=f"{metric} ({unit(metric)})" if unit(metric) else metric, title_justify="left")
        for name in heading:
            shown.add_column(Text(name), justify="left" if name in axes else "right")
        for cells in lines:
            shown.add_row(*map(Text, cells))
        console_of(False).print(shown)
    if missing:
        err.print(f"{len(missing)} of {len(steps)} evaluations are not done: {missing[0]} …", markup=False)


def gather(
    root: str, steps: Iterable[Step], metric: str
) -> tuple[dict[tuple[tuple[str, str], ...], Values], list[str]]:
    """Values by what a job varies (its labels without the seed), in the recipe's order; and the steps not done.

    Values of different data never share a line: where no label tells the data apart, there is one called `data`.
    """
    found: list[tuple[dict[str, str], ResultRow]] = []
    missing = []
    for step in steps:
        record = records.load(root, step)
        if record is None:
            missing.append(step.id)
            continue
        for row in results_of([record]):
            if row.metric == metric:
                labels = {k: v for k, v in step.labels.items() if k != "seed"}
                if row.variant:
                    labels["variant"] = row.variant
                found.append((labels, row))
    names = data_names(data_of(row) for _, row in found)
    told = {axis for labels, _ in found for axis in labels if _tells_data(axis, found)}
    groups: dict[tuple[tuple[str, str], ...], Values] = defaultdict(dict)
    for labels, row in found:
        more = {"data": names[data_of(row)]} if len(names) > 1 and not told else {}
        groups[tuple((labels | more).items())][row.seed] = row.value
    return dict(groups), missing


def _tells_data(axis: str, found: list[tuple[dict[str, str], ResultRow]]) -> bool:
    """Whether each value of this label stands for one data set."""
    data = {(labels.get(axis), data_of(row)) for labels, row in found}
    values = {value for value, _ in data}
    return len(data) == len(values) == len({of for _, of in data})


def summary(values: Values) -> dict[str, Any]:
    """Count, mean, sample standard deviation (None of one value), and the values by seed."""
    spread = stdev(values.values()) if len(values) > 1 else None
    return {"n": len(values), "mean": mean(values.values()), "std": spread, "values": values}


def _lines(
    groups: dict[tuple[tuple[str, str], ...], Values], axes: list[str], across: str
) -> tuple[list[str], list[list[str]]]:
    columns: dict[str, None] = {}
    rows: dict[tuple[str, ...], dict[str, Values]] = defaultdict(dict)
    for labels, values in groups.items():
        given = dict(labels)
        column = given.get(across, "–") if across else "mean ± std (seeds)"
        columns[column] = None
        rows[tuple(given.get(axis, "–") for axis in axes)][column] = values
    lines = [
        [*key, *(_cell(found[column]) if column in found else "–" for column in columns)]
        for key, found in rows.items()
    ]
    return [*axes, *columns], lines


def _cell(values: Values) -> str:
    found = summary(values)
    spread = f" ± {found['std']:.2f}" if found["std"] is not None else ""
    return f"{found['mean']:.2f}{spread} ({found['n']})"
