"""The command line: `itpn`, or `python -m pipeline`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from cluster import storage
from pipeline import doctor as doctors
from pipeline import preflight, recipes, view
from pipeline.commands import checkpoints, downstream, registry, report, results, runs, shard, table
from pipeline.commands import show as shows
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded, root_of
from pipeline.commands.run import (
    MAX_PARALLEL,
    AddressOpt,
    DryRunOpt,
    MaxParallelOpt,
    NoWaitOpt,
    OnlyOpt,
    SetOpt,
    recipe_of,
    run_recipe,
)
from pipeline.step import topological

app = typer.Typer(
    name="itpn",
    help="Pre-train Fast-iTPN: shard, pre-train, fine-tune, evaluate, register.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
results.app.command("table")(table.table)
app.add_typer(results.app, name="results")
app.add_typer(runs.app, name="runs")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(registry.app, name="registry")
app.add_typer(shard.app, name="shard")
app.command()(shows.show)
app.command("report")(report.report)
app.command("serve")(report.serve)
app.command("finetune")(downstream.finetune)
app.command("evaluate")(downstream.evaluate)

RecipeArg = Annotated[str, typer.Argument(help="Name of the recipe: " + ", ".join(recipes.names()))]


@app.command()
@guarded
def run(
    recipe: RecipeArg,
    root: RootOpt = "",
    set_: SetOpt = [],  # noqa: B006  (typer copies it)
    only: OnlyOpt = [],  # noqa: B006
    dry_run: DryRunOpt = False,
    no_wait: NoWaitOpt = False,
    max_parallel: MaxParallelOpt = MAX_PARALLEL,
    address: AddressOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Run a recipe; what is finished is skipped.

    [bold]Examples[/]

      itpn run demo --root runs/demo

      itpn run demo --root runs/demo --set pretrain.schedule.steps=50 --dry-run

      itpn run pretrain_large --root s3://bucket/itpn --address auto --set data.source=s3://bucket/ILSVRC2012
    """
    module, config = recipe_of(recipe, set_)
    run_recipe(
        recipe,
        module,
        config,
        root,
        only=only,
        dry_run=dry_run,
        no_wait=no_wait,
        max_parallel=max_parallel,
        address=address,
        as_json=as_json,
    )


@app.command()
@guarded
def status(
    recipe: RecipeArg,
    root: RootOpt = "",
    set_: SetOpt = [],  # noqa: B006
    as_json: JsonOpt = False,
) -> None:
    """Every step of a recipe: done, running (progress, ETA), failed (why), to do, drifted.

    Of training also losses, images/s, MFU, the newest checkpoint, the last events, where pictures and curves lie.

    [bold]Example[/]: itpn status demo --root runs/demo
    """
    module, config = recipe_of(recipe, set_)
    uri = storage.join(root_of(root))
    statuses = doctors.survey(uri, recipe, topological(module.build(config)), getattr(config, "search", None))
    console = console_of(as_json)
    progress = view.begun(uri, statuses)
    console.print(view.status_table(statuses, progress))
    if as_json:
        steps = view.status_json(uri, statuses, progress)
        view.print_json({"ok": True, "recipe": recipe, "root": uri, "steps": steps})


@app.command()
@guarded
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Also check what this recipe needs.")] = None,
    root: RootOpt = "",
    set_: SetOpt = [],  # noqa: B006
    address: AddressOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Check versions, the object store (is a second exclusive create really refused?), and a recipe's needs.

    [bold]Examples[/]

      itpn doctor --root s3://bucket/itpn

      itpn doctor pretrain_large --root s3://bucket/itpn
    """
    requirements = doctors.machine(address)
    requirements += [preflight.root(root)] if root or recipe else []
    if recipe:
        module, config = recipe_of(recipe, set_)
        requirements += module.requirements(config, address)
    findings = preflight.examine(requirements)
    console = console_of(as_json)
    for finding in findings:
        mark = "[green]ok[/]     " if finding.ok else "[bold red]missing[/]"
        console.print(f"{mark}  {finding.name}: {escape(finding.text)}", soft_wrap=True)
        if not finding.ok:
            console.print(f"           remedy: {escape(finding.remedy)}", soft_wrap=True)
    failed = [finding for finding in findings if not finding.ok]
    code = max((4 if f.exit_code == 4 else 2 for f in failed), default=0)
    if as_json:
        view.print_json({"ok": not failed, "exit_code": code, "checks": [vars(f) for f in findings]})
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
