"""`itpn runs …`: how steps ended, those that failed or were skipped too."""

from __future__ import annotations

from typing import Annotated, get_args

import typer
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, err, guarded, root_of
from pipeline.commands.results import WhereOpt
from pipeline.registry.events import RunRow
from pipeline.registry.rows import select
from stages.config import nearest

app = typer.Typer(help="How steps ended.", no_args_is_help=True)


@app.command("list")
@guarded
def runs_list(
    root: RootOpt = "",
    outcome: Annotated[
        str | None, typer.Option(help="Only finished, failed, skipped or stopped (early).")
    ] = None,
    run_name: Annotated[str | None, typer.Option("--run", help="Only this recipe.")] = None,
    where: WhereOpt = [],  # noqa: B006  (typer copies it)
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Every end of a step, oldest first: finished, failed (why), or skipped (which input failed).

    [bold]Examples[/]

      itpn runs list --root runs/demo --outcome failed

      itpn runs list --root runs/demo --where step~finetune --where 'wall_s>60' --json
    """
    from pipeline.registry import delta

    uri = storage.join(root_of(root))
    outcomes = list(get_args(RunRow.model_fields["outcome"].annotation))
    if outcome is not None and outcome not in outcomes:
        raise ConfigError(f"no step ends '{outcome}'", remedy=nearest(outcome, outcomes))
    everything = delta.current(uri, "runs")
    table = select(everything, where, equal={"outcome": outcome, "run": run_name}, limit=limit)
    rows = table.to_pylist()
    if as_json:
        view.print_json({"ok": True, "root": uri, "runs": rows})
        return
    if not rows:
        some = f"none of the {len(everything)} runs under {uri} is like that"
        err.print(some if len(everything) else f"no runs under {uri}", markup=False)
        return
    shown = Table()
    for heading in ("ended", "run", "step", "outcome", "code", "seconds", "host", "why"):
        number = heading in ("code", "seconds")
        shown.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        facts = (row["created_at"][:19], row["run"], row["step"], row["outcome"], str(row["exit_code"]))
        cells = (*facts, f"{row['wall_s']:.1f}", row["host"], row["error"] or "")
        shown.add_row(*(Text(cell) for cell in cells))
    console_of(False).print(shown)
