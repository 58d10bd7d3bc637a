"""Running a recipe with a config: what `itpn run` and the commands that make a config of their own share."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from cluster import storage
from cluster.errors import ConfigError, StorageUnavailable
from cluster.jobs import Session
from pipeline import preflight, recipes, view
from pipeline.commands.common import console_of, err, root_of
from pipeline.registry import results_of
from pipeline.runner import Runner
from pipeline.search import Search
from pipeline.status import State, StepStatus, exit_code
from pipeline.step import Step, select, topological
from stages.config import Config, parse_assignments

SetOpt = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe's config.")
]
OnlyOpt = Annotated[
    list[str], typer.Option("--only", metavar="STEP", help="Only these steps, and what they need.")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
NoWaitOpt = Annotated[bool, typer.Option("--no-wait", help="Exit 3 when another run holds a step's lease.")]
MaxParallelOpt = Annotated[int, typer.Option(min=1, help="Steps in flight at once, those that queue too.")]
AddressOpt = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_ADDRESS", help="Ray cluster to use; none starts a local one."),
]
MAX_PARALLEL = 32  # Ray packs what fits; a step that queues costs a thread and a lease


def recipe_of(name: str, assignments: list[str]) -> tuple[Any, Config]:
    """The recipe's module, and its config with the assignments of `--set`."""
    module = recipes.load(name)
    return module, module.Recipe().with_set(parse_assignments(assignments))


def run_recipe(
    recipe: str,
    module: Any,
    config: Config,
    root: str,
    *,
    only: list[str],
    dry_run: bool,
    no_wait: bool,
    max_parallel: int,
    address: str | None,
    as_json: bool,
) -> None:
    """Run a recipe's steps, or with `dry_run` print them; raises typer.Exit with the run's exit code."""
    search: Search | None = getattr(config, "search", None)
    steps = select(topological(module.build(config)), only) if only else topological(module.build(config))
    if dry_run:
        uri = storage.join(root_of(root))
        statuses = Runner(uri, recipe, steps, search=search).plan()
        console_of(as_json).print(view.plan_table(uri, statuses))
        if as_json:
            view.print_json(
                {"ok": True, "recipe": recipe, "root": uri, "steps": view.status_json(uri, statuses)}
            )
        return
    # Only what the steps to do need is asked for, and of a finished run nothing: it starts neither torch nor Ray.
    to_do = _kinds_to_do(root, recipe, steps, search)
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
        search=search,
        on_change=lambda status: shown.changed(status),
    )
    shown = view.RunView(uri, list(runner.status.values()), console)
    console.print(f"recipe {recipe}  →  {uri}", highlight=False, markup=False, soft_wrap=True)
    with shown:
        statuses = runner.run()
    _tell(uri, recipe, statuses, console, as_json)


def _kinds_to_do(root: str, recipe: str, steps: list[Step], search: Search | None) -> set[str]:
    """The kinds of the steps that are not done; all of them where the root is missing or does not answer.

    Raises DriftError when an output was made from another config: nothing will run, whatever is there or missing.
    """
    kinds = {step.kind for step in steps}
    if not root:
        return kinds
    try:
        storage.list_files(storage.join(root, "registry"), most=1, deadline_s=preflight.ANSWER_S)
        statuses = Runner(storage.join(root), recipe, steps, search=search).plan()
    except (ConfigError, StorageUnavailable):
        return kinds  # the preflight tells what is wrong with it
    drifted = next((status.error for status in statuses if status.state is State.DRIFTED), None)
    if drifted:
        raise drifted
    left = [s for s in statuses if s.state is not State.STOPPED_EARLY and s.state is not State.BLOCKED]
    return {status.step.kind for status in left if status.state is not State.DONE}


def _tell(root: str, recipe: str, statuses: list[StepStatus], console: Console, as_json: bool) -> None:
    code = exit_code(statuses)
    # Not asked of the registry: of equal evaluations it holds the first alone, which may be another recipe's.
    rows = results_of(status.record for status in statuses if status.record)
    if rows:
        console.print()
        console.print(view.results_table(rows))
    done = [status for status in statuses if status.state is State.DONE]
    new = sum(not status.reused for status in done)
    early = sum(status.state is State.STOPPED_EARLY for status in statuses)
    told = f", {early} stopped early" if early else ""
    console.print(f"\n{len(done)} of {len(statuses)} steps done, {new} of them in this run{told}.")
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
