"""Recipes: one file each, which says everything about a run.

A recipe module has a docstring (command, hardware, hours, expected result), a config class `Recipe`
(defaults are the recipe; `--set` replaces values), `build(config) -> list[Step]`, and
`requirements(config, address) -> list[Requirement]`, what the machines must have before anything starts. It may have
`RETENTION`, what `itpn checkpoints gc` keeps of its output; without it everything that is finished stays.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from cluster.errors import ConfigError
from pipeline.registry.retention import Retention
from stages.config import nearest


def names() -> list[str]:
    """The recipes there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The recipe module; raises ConfigError with the nearest name when there is none."""
    if name not in names():
        raise ConfigError(f"there is no recipe '{name}'", remedy=nearest(name, names()))
    return importlib.import_module(f"{__name__}.{name}")


def retention(name: str) -> Retention:
    """What is to be kept of a recipe's output; the safe default for a recipe that says nothing, or is no more."""
    return getattr(load(name), "RETENTION", Retention()) if name in names() else Retention()
