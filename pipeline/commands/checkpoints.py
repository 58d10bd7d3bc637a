"""`itpn checkpoints …`: which weights there are, where they come from, and which of them are in use."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, err, guarded, root_of
from pipeline.commands.export import checkpoints_export
from pipeline.commands.gc import checkpoints_gc
from pipeline.commands.lineage import print_lineage
from pipeline.registry import CheckpointRow, Registry
from pipeline.registry.aliases import Alias, Aliases
from pipeline.registry.deletions import Deletion, Deletions
from pipeline.registry.evaluated import data_names, data_of
from pipeline.registry.lineage import find, lineage, verify
from pipeline.registry.metrics import measure, unit
from pipeline.written import size
from stages.config import nearest

app = typer.Typer(help="Checkpoints and the aliases that point at them.", no_args_is_help=True)
app.command("gc")(checkpoints_gc)
app.command("export")(checkpoints_export)
CheckpointArg = Annotated[str, typer.Argument(help="An alias, a step, or the start of a sha256.")]
AliasArg = Annotated[str, typer.Argument(help="Name of the alias, e.g. production.")]


@app.command("list")
@guarded
def checkpoints_list(
    root: RootOpt = "",
    task: Annotated[str | None, typer.Option(help="Only pretrain or classify.")] = None,
    run_name: Annotated[str | None, typer.Option("--run", help="Only this recipe.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """All finished checkpoints, oldest first, with their aliases.

    [bold]Example[/]: itpn checkpoints list --root runs/demo --task classify
    """
    registry = Registry(root_of(root))
    names, gone = _names(registry), Deletions(registry).done()
    rows = [r for r in registry.checkpoints() if run_name in (None, r.run)]
    rows = [r for r in rows if task in (None, r.checkpoint.task)]
    if as_json:
        found = [
            r.model_dump(mode="json") | {"aliases": names.get(_key(r), []), "deleted": _gone(r, gone)} for r in rows
        ]  # fmt: skip
        view.print_json({"ok": True, "root": registry.root, "checkpoints": found})
        return
    if not rows:
        err.print(f"no checkpoints under {registry.root}", markup=False)
        return
    table = Table()
    for heading in ("created", "step", "task", "init", "seed", "MB", "sha256", "aliases"):
        table.add_column(heading, justify="right" if heading in ("seed", "MB") else "left", overflow="fold")
    for r in rows:
        c = r.checkpoint
        aliases = ", ".join([*names.get(_key(r), []), *(["(deleted)"] if _gone(r, gone) else [])])
        facts = (
            r.created_at[:19],
            r.step,
            c.task,
            c.init,
            str(c.seed),
            f"{c.bytes / 1e6:.1f}",
            c.sha256[:12],
        )
        table.add_row(*(Text(text) for text in (*facts, aliases)))
    console_of(False).print(table)


@app.command("show")
@guarded
def checkpoints_show(checkpoint: CheckpointArg, root: RootOpt = "", as_json: JsonOpt = False) -> None:
    """One checkpoint: size, metrics, results, aliases, and its lineage back to the data.

    [bold]Example[/]: itpn checkpoints show production --root runs/demo
    """
    registry = Registry(root_of(root))
    row = find(registry, checkpoint)
    origin = lineage(registry.root, row.step)
    results = registry.results(checkpoint_sha256=row.checkpoint.sha256)
    aliases = _names(registry).get(_key(row), [])
    deleted = _gone(row, Deletions(registry).done())
    if as_json:
        payload: dict[str, Any] = {"checkpoint": row.model_dump(mode="json"), "aliases": aliases}
        payload["deleted"] = deleted
        payload |= {"lineage": origin, "results": [r.model_dump(mode="json") for r in results]}
        view.print_json({"ok": True, "root": registry.root, **payload})
        return
    console = console_of(False)
    facts: dict[str, Any] = {"weights": row.checkpoint.uri, "sha256": row.checkpoint.sha256}
    if deleted:
        facts["deleted"] = f"{deleted['at'][:19]} by {deleted['by']}@{deleted['host']}: {deleted['why']}"
    facts |= {"size": size(row.checkpoint.bytes), "aliases": ", ".join(aliases) or "–"}
    facts |= {name: f"{measure(value, name)} {unit(name)}" for name, value in row.metrics.items()}
    names = data_names(map(data_of, results))
    for r in results:
        what = " ".join(filter(None, (f"{names[data_of(r)]}/{r.metric}", r.variant)))
        facts[what] = f"{measure(r.value, r.metric)} {unit(r.metric)}"
    width = max(28, 2 + max(map(len, facts)))
    for key, value in facts.items():
        console.print(Text(f"{key:<{width}}{str(value).rstrip()}"), soft_wrap=True)
    console.print()
    print_lineage(console, origin)


@app.command("verify")
@guarded
def checkpoints_verify(
    checkpoint: Annotated[
        str | None, typer.Argument(help="An alias, a step, or a sha256; without it all.")
    ] = None,
    root: RootOpt = "",
    as_json: JsonOpt = False,
) -> None:
    """Read every file of a checkpoint, or of all, and compare size and sha256 with the record. Exit 5 on damage.

    [bold]Example[/]: itpn checkpoints verify production --root runs/demo
    """
    registry = Registry(root_of(root))
    rows = [find(registry, checkpoint)] if checkpoint else list(registry.checkpoints())
    findings = verify(registry, rows)
    bad = [f for f in findings if not f["ok"]]
    deleted = [f for f in findings if f.get("deleted")]
    for finding in deleted:
        err.print(Text(f"{finding['step']}: {finding['found']}"), soft_wrap=True)
    for finding in bad:
        err.print(Text(f"damaged: {finding['step']}/{finding['path']}: {finding['found']}"), soft_wrap=True)
    counts = f"{len(findings) - len(deleted)} files of {len(rows) - len(deleted)} checkpoints read, {len(bad)} damaged"
    console_of(as_json).print(counts + (f"; {len(deleted)} checkpoints were deleted" if deleted else ""))
    if as_json:
        view.print_json({"ok": not bad, "exit_code": 5 if bad else 0, "files": findings})
    raise typer.Exit(5 if bad else 0)


@app.command("promote")
@guarded
def checkpoints_promote(
    checkpoint: CheckpointArg,
    alias: AliasArg,
    root: RootOpt = "",
    rule: Annotated[
        str | None,
        typer.Option(help="Refuse unless it holds: 'imagenet-1k/val/top1 >= production - 0.1'."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Point an alias at a checkpoint; moves of others at the same time are not lost.

    [bold]Example[/]: itpn checkpoints promote finetune/demo-pretrained-s0/v1 production --root runs/demo
    """
    registry = Registry(root_of(root))
    _tell(Aliases(registry).promote(find(registry, checkpoint), alias, rule), as_json)


@app.command("rollback")
@guarded
def checkpoints_rollback(alias: AliasArg, root: RootOpt = "", as_json: JsonOpt = False) -> None:
    """Point an alias at what it pointed at before.

    [bold]Example[/]: itpn checkpoints rollback production --root runs/demo
    """
    _tell(Aliases(Registry(root_of(root))).rollback(alias), as_json)


@app.command("history")
@guarded
def checkpoints_history(alias: AliasArg, root: RootOpt = "", as_json: JsonOpt = False) -> None:
    """Every move of an alias: what, when, by whom, under which rule.

    [bold]Example[/]: itpn checkpoints history production --root runs/demo
    """
    registry = Registry(root_of(root))
    aliases = Aliases(registry).all()
    found = aliases.get(alias)
    if found is None:
        raise ConfigError(
            f"there is no alias '{alias}'",
            remedy=nearest(alias, list(aliases))
            if aliases
            else f"itpn checkpoints promote CHECKPOINT {alias}",
        )
    if as_json:
        view.print_json({"ok": True, **found.model_dump(mode="json")})
        return
    steps = {move.id: move.step for move in found.moves}
    for move in found.moves:
        note = (
            f"  (roll-back of {steps.get(move.rolled_back_from, move.rolled_back_from)})"
            if move.rolled_back_from
            else f"  {move.rule}: {move.verdict}"
            if move.rule
            else ""
        )
        line = f"{move.at[:19]}  {move.step}  {move.checkpoint_sha256[:12]}  {move.by}@{move.host}{note}"
        console_of(False).print(Text(line), soft_wrap=True)


def _tell(alias: Alias, as_json: bool) -> None:
    now = alias.current
    verdict = f" ({now.verdict})" if now.verdict else ""
    console_of(as_json).print(
        Text(f"{alias.name} -> {now.step}  {now.checkpoint_sha256[:12]}{verdict}"), soft_wrap=True
    )
    if as_json:
        view.print_json({"ok": True, "alias": alias.name, "current": now.model_dump(mode="json")})


def _gone(row: CheckpointRow, gone: dict[str, Deletion]) -> dict[str, Any] | None:
    found = gone.get(row.checkpoint.uri)
    return found.model_dump(mode="json") if found else None


def _key(row: CheckpointRow) -> tuple[str, str]:
    return row.step, row.checkpoint.sha256


def _names(registry: Registry) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for alias in Aliases(registry).all().values():
        found.setdefault((alias.current.step, alias.current.checkpoint_sha256), []).append(alias.name)
    return found
