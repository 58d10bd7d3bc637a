"""`itpn checkpoints gc`: what nothing needs any more, and, when told to, its deletion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError
from pipeline import recipes, view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded, root_of
from pipeline.registry import Registry, garbage
from pipeline.registry.inventory import Group
from pipeline.registry.retention import Retention
from stages.config import nearest


@guarded
def checkpoints_gc(
    root: RootOpt = "",
    apply: Annotated[bool, typer.Option("--apply", help="Delete; without it nothing is touched.")] = False,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON: {"RECIPE": {"rules": […], …}, "*": {…}} in place of what the recipes say.',
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """List what retention would delete and what stays, with the reasons; --apply deletes it.

    Never goes what an alias, an unfinished step or a descendant needs. A recipe without rules keeps everything that
    is finished, but for training checkpoints, files of dead attempts, and unfinished uploads.

    [bold]Examples[/]

      itpn checkpoints gc --root runs/demo

      itpn checkpoints gc --root s3://bucket/itpn --policy retention.json --apply
    """
    registry = Registry(root_of(root))
    policies = policies_of(policy)
    groups = (garbage.collect if apply else garbage.plan)(registry, policies)
    going = [group for group in groups if group.delete]
    if as_json:
        found = [{**vars(group), "uris": list(group.uris)} for group in groups]
        totals = {"bytes": sum(g.bytes for g in going), "objects": sum(len(g.uris) for g in going)}
        view.print_json({"ok": True, "root": registry.root, "applied": apply, **totals, "groups": found})
    console = console_of(as_json)
    if not groups:
        console.print(f"nothing lies under {registry.root}", markup=False, soft_wrap=True)
        return
    console.print(_table(groups, "deleted" if apply else "would go"))
    console.print(_totals(going, "deleted" if apply else "would go"))
    if going and not apply:
        console.print("nothing was touched: this was a dry run; --apply deletes")


def policies_of(file: Path | None) -> Callable[[str], Retention]:
    """What each recipe wants kept: as the file says, else its `*`, else the recipe itself, else everything.

    Raises ConfigError for a file that cannot be read, naming the wrong key.
    """
    told: dict[str, Retention] = {}
    if file is not None:
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"the policy {file} cannot be read", found=str(error)) from None
        if not isinstance(content, dict):
            raise ConfigError(
                f"the policy {file} is no object", expected='{"RECIPE": {"rules": […]}, "*": {…}}'
            )
        for name, values in content.items():
            if name != "*" and name not in recipes.names():
                raise ConfigError(
                    f"the policy {file} names no recipe: '{name}'",
                    remedy=nearest(name, [*recipes.names(), "*"]),
                )
            told[name] = Retention.parse(values)

    def policy(recipe: str) -> Retention:
        if recipe in told or "*" in told:
            return told.get(recipe) or told["*"]
        return recipes.retention(recipe)

    return policy


def _table(groups: list[Group], verb: str) -> Table:
    table = Table()
    for heading in ("step", "what", "name", "objects", "MB", "", "why"):
        table.add_column(
            heading, justify="right" if heading in ("objects", "MB") else "left", overflow="fold"
        )
    for group in sorted(groups, key=lambda g: (not g.delete, g.step, g.kind, g.name)):
        facts = (group.step, group.kind, group.name, str(len(group.uris)), f"{group.bytes / 1e6:.1f}")
        state = Text(verb if group.delete else "stays", style="red" if group.delete else "green")
        table.add_row(*(Text(text) for text in facts), state, Text(group.why))
    return table


def _totals(going: list[Group], verb: str) -> str:
    lines = []
    for kind in sorted({group.kind for group in going}):
        members = [group for group in going if group.kind == kind]
        lines.append(f"{kind}: {sum(g.bytes for g in members) / 1e6:.1f} MB in {len(members)} groups")
    total = sum(group.bytes for group in going)
    objects = sum(len(group.uris) for group in going)
    text = f"{verb}: {total / 1e6:.1f} MB ({total} bytes) in {objects} objects"
    return text + (f" ({', '.join(lines)})" if lines else "")
