"""The command line: `itpn`, or `python -m pipeline`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from cluster import storage
from cluster.errors import ConfigError, StorageUnavailable
from cluster.jobs import Session
from pipeline import doctor as doctors
from pipeline import preflight, recipes, view
from pipeline.commands import checkpoints, registry, report, results, runs, shard
from pipeline.commands import show as shows
from pipeline.commands.common import JsonOpt, RootOpt, console_of, err, guarded, root_of
from pipeline.registry import results_of
from pipeline.runner import Runner, State, StepStatus, exit_code
from pipeline.step import Step, select, topological
from stages.config import Config, parse_assignments

app = typer.Typer(
    name="itpn",
    help="Pre-train Fast-iTPN: shard, pre-train, fine-tune, evaluate, register.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(results.app, name="results")
app.add_typer(runs.app, name="runs")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(registry.app, name="registry")
app.add_typer(shard.app, name="shard")
app.command()(shows.show)
app.command("report")(report.report)
app.command("serve")(report.serve)

RecipeArg = Annotated[str, typer.Argument(help="Name of the recipe: " + ", ".join(recipes.names()))]
SetOpt = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe's config.")
]
OnlyOpt = Annotated[
    list[str], typer.Option("--only", metavar="STEP", help="Only these steps, and what they need.")
]
AddressOpt = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_ADDRESS", help="Ray cluster to use; none starts a local one."),
]


@app.command()
@guarded
def run(
    recipe: RecipeArg,
    root: RootOpt = "",
    set_: SetOpt = [],  # noqa: B006  (typer copies it)
    only: OnlyOpt = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Exit 3 when another run holds a step's lease.")
    ] = False,
    max_parallel: Annotated[int, typer.Option(min=1, help="Steps in flight at once.")] = 8,
    address: AddressOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Run a recipe; what is finished is skipped.

    [bold]Examples[/]

      itpn run demo --root runs/demo

      itpn run demo --root runs/demo --set pretrain.schedule.steps=50 --dry-run

      itpn run pretrain_large --root s3://bucket/itpn --address auto --set data.source=s3://bucket/ILSVRC2012
    """
    module, config = _recipe(recipe, set_)
    steps = select(topological(module.build(config)), only) if only else topological(module.build(config))
    if dry_run:
        uri = storage.join(root_of(root))
        statuses = Runner(uri, recipe, steps).plan()
        console_of(as_json).print(view.plan_table(uri, statuses))
        if as_json:
            view.print_json(
                {"ok": True, "recipe": recipe, "root": uri, "steps": view.status_json(uri, statuses)}
            )
        return
    # Only what the steps to do need is asked for, and of a finished run nothing: it starts neither torch nor Ray.
    to_do = _kinds_to_do(root, recipe, steps)
    if to_do:
        needed = [need for need in module.requirements(config, address) if need.kinds & to_do]
        preflight.demand([preflight.root(root), *needed])
    uri = storage.join(root)
    console = console_of(as_json)
    runner = Runner(
        uri,
        recipe,
        steps,
        open_session=partial(Session, address),
        max_parallel=max_parallel,
        wait_for_lease=not no_wait,
        on_change=lambda status: shown.changed(status),
    )
    shown = view.RunView(uri, list(runner.status.values()), console)
    console.print(f"recipe {recipe}  →  {uri}", highlight=False, markup=False, soft_wrap=True)
    with shown:
        statuses = runner.run()
    _tell(uri, recipe, statuses, console, as_json)


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
    module, config = _recipe(recipe, set_)
    uri = storage.join(root_of(root))
    statuses = doctors.survey(uri, recipe, topological(module.build(config)))
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
        module, config = _recipe(recipe, set_)
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


def _recipe(name: str, assignments: list[str]) -> tuple[Any, Config]:
    module = recipes.load(name)
    return module, module.Recipe().with_set(parse_assignments(assignments))


def _kinds_to_do(root: str, recipe: str, steps: list[Step]) -> set[str]:
    """The kinds of the steps that are not done; all of them where the root is missing or does not answer."""
    kinds = {step.kind for step in steps}
    if not root:
        return kinds
    try:
        storage.list_files(storage.join(root, "registry"), most=1, deadline_s=preflight.ANSWER_S)
        statuses = Runner(storage.join(root), recipe, steps).plan()
    except (ConfigError, StorageUnavailable):
        return kinds  # the preflight tells what is wrong with it
    return {status.step.kind for status in statuses if status.state is not State.DONE}


def _tell(root: str, recipe: str, statuses: list[StepStatus], console: Console, as_json: bool) -> None:
    code = exit_code(statuses)
    # Not asked of the registry: of equal evaluations it holds the first alone, which may be another recipe's.
    rows = results_of(status.record for status in statuses if status.record)
    if rows:
        console.print()
        console.print(view.results_table(rows))
    done = [status for status in statuses if status.state is State.DONE]
    new = sum(not status.reused for status in done)
    console.print(f"\n{len(done)} of {len(statuses)} steps done, {new} of them in this run.")
    for failed in (status for status in statuses if status.error):
        word = "failed" if failed.state is State.FAILED else failed.state.value
        err.print(f"\n[bold red]{failed.step.id} {word}:[/] {escape(str(failed.error))}", soft_wrap=True)
    if as_json:
        view.print_json(
            {
                "ok": code == 0,
                "exit_code": code,
                "recipe": recipe,
                "root": root,
                "steps": view.status_json(root, statuses),
                "results": [row.model_dump(mode="json") for row in rows],
            }
        )
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
