"""What every command of `itpn` shares: its options, its consoles, and how it ends."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from cluster.errors import ConfigError, ItpnError
from pipeline import view

RootOpt = Annotated[
    str, typer.Option("--root", envvar="ITPN_ROOT", help="URI under which every output lives.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Last line of stdout is one JSON object.")]

err = Console(stderr=True, highlight=False)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an ItpnError into a message, the JSON object when asked for, and the error's exit code."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ItpnError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            if kwargs.get("as_json"):
                view.print_json({"ok": False, "exit_code": error.exit_code, "error": str(error)})
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, SystemExit) as end:  # the second is what Session makes of SIGTERM
            code = 130 if isinstance(end, KeyboardInterrupt) else 143
            err.print("stopped; finished steps are kept, run the same command again to go on")
            if kwargs.get("as_json"):
                view.print_json({"ok": False, "exit_code": code, "error": "stopped"})
            raise typer.Exit(code) from None

    wrapper.__signature__ = inspect.signature(command, eval_str=True)  # type: ignore[attr-defined]
    return wrapper


def root_of(root: str) -> str:
    """The root that was given; raises ConfigError when none was."""
    if not root:
        raise ConfigError("no root was given", remedy="--root URI, or set ITPN_ROOT")
    return root


def console_of(as_json: bool) -> Console:
    """Where text for people goes: stdout, or stderr when stdout is for the JSON object."""
    return Console(stderr=as_json, highlight=False, width=None if sys.stdout.isatty() else _width())


def _width() -> int:
    return max(int(os.environ.get("COLUMNS", 0)), 140)
