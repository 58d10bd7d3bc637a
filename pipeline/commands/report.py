"""`itpn report` and `itpn serve`: what the root holds, as pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import storage
from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded, root_of


@guarded
def report(
    root: RootOpt = "",
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Local folder; a report that is in it is replaced.")
    ] = Path("report"),
    as_json: JsonOpt = False,
) -> None:
    """Write a folder of pages: leaderboard, runs with their curves, checkpoints, lineage. It needs no network.

    [bold]Example[/]: itpn report --root runs/demo --out report
    """
    from pipeline.report import build

    index = build(storage.join(root_of(root)), out).resolve()
    console_of(as_json).print(str(index), soft_wrap=True, markup=False)
    if as_json:
        view.print_json({"ok": True, "index": str(index)})


@guarded
def serve(
    root: RootOpt = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 8321,
    every_s: Annotated[int, typer.Option("--every", min=1, help="Seconds between two looks.")] = 3,
    as_json: JsonOpt = False,
) -> None:
    """Show the same pages live, on this machine only, until Ctrl+C.

    [bold]Example[/]: itpn serve --root runs/demo
    """
    from pipeline.report import LiveReport, make_server

    live = LiveReport(storage.join(root_of(root)), every_s)
    try:
        server = make_server(live, port)
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be used", found=str(error), remedy="--port 0 takes a free one"
        ) from None
    url = f"http://{server.server_address[0]}:{server.server_address[1]}/"  # type: ignore[str-bytes-safe]
    console_of(as_json).print(url, soft_wrap=True)
    if as_json:
        view.print_json({"ok": True, "url": url})
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
