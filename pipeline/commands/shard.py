"""`itpn shard …`: look after sharded data sets."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress

from pipeline import view
from pipeline.commands.common import JsonOpt, console_of, guarded
from stages.shard.verify import verify

app = typer.Typer(help="Sharded data sets.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Sharded data sets."""


@app.command("verify")
@guarded
def shard_verify(
    uri: Annotated[str, typer.Argument(help="Manifest, or output folder of a finished shard step.")],
    sample: Annotated[
        int | None, typer.Option(min=1, help="Hash only this many shards; of the rest, compare the size.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sample.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Files read at once.")] = 8,
    as_json: JsonOpt = False,
) -> None:
    """Read a data set again, compare it with its manifest, name every shard that differs (exit 5).

    [bold]Examples[/]

      itpn shard verify runs/demo/shard/clipart-12/v1

      itpn shard verify s3://bucket/itpn/shard/imagenet-1k/v1 --sample 50 --json
    """
    console = console_of(as_json)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        found = verify(
            uri,
            sample=sample,
            seed=seed,
            workers=workers,
            on_file=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for item in found.differences:
        console.print(f"[bold red]differs[/]  {escape(item.file)}: {escape(item.reason)}", soft_wrap=True)
        console.print(f"         {escape(item.uri)}", soft_wrap=True)
    console.print(
        f"{found.read} of {found.shards} shards read whole ({found.bytes_read / 1e6:.1f} MB), "
        + (f"{len(found.differences)} files differ" if found.differences else "all as the manifest says"),
        soft_wrap=True,
    )
    code = 5 if found.differences else 0
    if as_json:
        view.print_json(
            {
                "ok": not code,
                "exit_code": code,
                "manifest": found.manifest,
                "shards": found.shards,
                "read": found.read,
                "bytes_read": found.bytes_read,
                "differences": [item._asdict() for item in found.differences],
            }
        )
    raise typer.Exit(code)
