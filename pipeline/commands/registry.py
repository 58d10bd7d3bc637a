"""`itpn registry …`: the table view of the registry."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster import storage
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded, root_of

app = typer.Typer(help="The registry's table view.", no_args_is_help=True)


@app.callback()
def registry() -> None:
    """The registry's table view."""


@app.command("sync")
@guarded
def registry_sync(
    root: RootOpt = "",
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Write the tables anew from all events.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Bring the Delta tables under ROOT/registry/delta up to date with the events.

    [bold]Example[/]: itpn registry sync --root runs/demo
    """
    from pipeline.registry import delta

    uri = storage.join(root_of(root))
    added = delta.sync(uri, rebuild=rebuild)
    for folder, count in added.items():
        console_of(as_json).print(f"{count:>8} new rows  {delta.table_uri(uri, folder)}", soft_wrap=True)
    if as_json:
        view.print_json({"ok": True, "root": uri, "added": added})
