"""Jobs as data: what each fine-tuning of a recipe changes, given one by one or as a grid.

    --set 'grid.resolution=[224,384]' --set 'grid.lr=[5e-5,1e-4]' --set 'grid.seed=[0,1,2]'
    --set 'jobs=[{"resolution":512,"lr":5e-5},{"name":"probe","train":"head"}]'

A job's name is made of the values that it gives, whatever the other jobs are, so that adding a value to a grid
leaves the names, and so the outputs, of the jobs that were there.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from cluster.errors import ConfigError
from stages.config import Config
from stages.finetune.config import FinetuneConfig
from stages.model.config import BackboneConfig, accelerated

Tokens = Literal["dense", "fast"]  # fast: token migration and gathering
Train = Literal["all", "head"]  # head: the backbone is frozen (linear probe)


class Job(Config):
    """One fine-tuning: None keeps the recipe's value. `more` gives any other value by its dotted key."""

    name: str = Field(default="", pattern=r"^[\w.+-]*$")  # by default made of what follows
    checkpoint: str | None = None  # which of the recipe's checkpoints; "scratch" is none
    resolution: int | None = None  # pixels, of fine-tuning and evaluation
    tokens: Tokens | None = None
    train: Train | None = None
    lr: float | None = None
    layer_decay: float | None = None
    drop_path: float | None = None
    weight_decay: float | None = None
    ema_decay: float | None = None
    epochs: float | None = None
    more: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None


class Grid(Config):
    """Every combination of the values given is a job; an empty axis keeps the recipe's value."""

    checkpoint: tuple[str, ...] = ()
    resolution: tuple[int, ...] = ()
    tokens: tuple[Tokens, ...] = ()
    train: tuple[Train, ...] = ()
    lr: tuple[float, ...] = ()
    layer_decay: tuple[float, ...] = ()
    drop_path: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    ema_decay: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()
    more: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    seed: tuple[int, ...] = ()


_PLACES = {
    "train": "train",
    "lr": "optimiser.lr",
    "layer_decay": "optimiser.layer_decay",
    "drop_path": "backbone.drop_path",
    "weight_decay": "optimiser.weight_decay",
    "ema_decay": "ema_decay",
    "epochs": "schedule.epochs",
    "seed": "seed",
}
_LABELS = {
    "resolution": "{}px",
    "lr": "lr{:g}",
    "layer_decay": "ld{:g}",
    "drop_path": "dp{:g}",
    "weight_decay": "wd{:g}",
    "ema_decay": "ema{:g}",
    "epochs": "{:g}ep",
    "seed": "s{}",
}


def expand(grid: Grid, jobs: Sequence[Job] = ()) -> list[Job]:
    """The grid's jobs, then those given one by one, all named; one job that changes nothing where there are none.

    Raises ConfigError when two have the same name.
    """
    axes = {name: getattr(grid, name) for name in Grid.model_fields if name != "more" and getattr(grid, name)}
    axes |= {f"more.{key}": values for key, values in grid.more.items() if values}
    if "seed" in axes:  # the last to vary, and the last in the name
        axes["seed"] = axes.pop("seed")
    found = []
    for values in itertools.product(*axes.values()) if axes else ():
        given = dict(zip(axes, values, strict=True))
        more = {k.removeprefix("more."): given.pop(k) for k in list(given) if k.startswith("more.")}
        found.append(Job(**given, more=more))
    found += jobs
    named = [job if job.name else job.model_copy(update={"name": _name(job)}) for job in found or [Job()]]
    names = [job.name for job in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two jobs are called '{twice[0]}'",
            remedy="give one of them a 'name', or take it out of the grid",
        )
    return named


def labels(job: Job) -> dict[str, str]:
    """What the job gives, by axis, as text."""
    found: dict[str, str] = {}
    for axis in Job.model_fields:
        value = getattr(job, axis)
        if axis == "more":
            found |= {key: f"{key.rsplit('.', 1)[-1]}{_text(item)}" for key, item in value.items()}
        elif axis != "name" and value is not None:
            found[axis] = _LABELS.get(axis, "{}").format(value)
    return found


def configured(
    base: FinetuneConfig, job: Job, accelerate: Callable[[BackboneConfig], BackboneConfig] = accelerated
) -> FinetuneConfig:
    """The recipe's fine-tuning with the job's values; `accelerate` gives a backbone its fast tokens.

    Raises ConfigError for a value that does not fit, naming the job.
    """
    values = {place: getattr(job, axis) for axis, place in _PLACES.items() if getattr(job, axis) is not None}
    if job.epochs is not None:
        values["schedule.steps"] = None
    if job.resolution is not None:
        values |= {"backbone.img_size": job.resolution, "data.view.size": job.resolution}
    if job.tokens is not None:
        values |= {"backbone.migration": None, "backbone.gathering": None}
    try:
        config = base.with_set({key: json.dumps(value) for key, value in (values | job.more).items()})
        if job.tokens == "fast":
            config = config.model_copy(update={"backbone": accelerate(config.backbone)})
    except ConfigError as error:
        raise ConfigError(f"job '{job.name}': {error.message}", remedy=error.remedy) from None
    return config


def _name(job: Job) -> str:
    return "-".join(_safe(text) for text in labels(job).values()) or "job"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _safe(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)
