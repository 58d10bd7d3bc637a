"""What a run looks like: a live table on a terminal, lines elsewhere, and the table of results at the end."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from statistics import mean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import ItpnError
from pipeline.registry import ResultRow
from pipeline.registry.evaluated import data_names, data_of
from pipeline.registry.metrics import unit
from pipeline.status import State, StepStatus
from stages.train.layout import checkpoint_steps

_EVENTS = 5  # of a training step, that are shown

_COLOURS = {
    State.TODO: "dim",
    State.WAITING: "yellow",
    State.RUNNING: "cyan",
    State.DONE: "green",
    State.FAILED: "bold red",
    State.STOPPED: "yellow",
    State.STOPPED_EARLY: "yellow",
    State.BLOCKED: "red",
    State.DRIFTED: "bold red",
}


class RunView:
    """Follows a run: `changed` is the runner's callback, the progress of running steps is polled from storage."""

    def __init__(self, root: str, statuses: list[StepStatus], console: Console, every_s: float = 5.0) -> None:
        self._root, self._statuses, self._console, self._every_s = root, statuses, console, every_s
        self._progress: dict[str, dict[str, Any]] = {}
        self._told: dict[str, tuple[Any, ...]] = {}
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._thread = threading.Thread(target=self._poll, name="view", daemon=True)

    def __enter__(self) -> RunView:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join(timeout=5)  # it may be waiting for a store that does not answer
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def changed(self, status: StepStatus) -> None:
        """Tell that a step's state changed."""
        if status.state is State.RUNNING:
            self._progress.pop(status.step.id, None)
        if self._live:
            return
        with self._lock:
            if self._told.get(status.step.id) != (key := (status.state, status.note)):
                self._told[status.step.id] = key
                self._line(status)

    def _poll(self) -> None:
        last = time.monotonic()
        while not self._end.wait(1.0):
            for status in self._statuses:
                if status.state is State.RUNNING:
                    progress = read_progress(self._root, status) or {}
                    # What an earlier attempt left behind says nothing about this one.
                    fresh = progress.get("at", 0) >= status.began
                    self._progress[status.step.id] = progress if fresh else {}
            if self._live:
                self._live.update(self._table())
            elif time.monotonic() - last >= self._every_s:
                last = time.monotonic()
                with self._lock:
                    for status in self._statuses:
                        if status.state is State.RUNNING:
                            self._line(status)

    def _line(self, status: StepStatus) -> None:
        clock = time.strftime("%H:%M:%S")
        detail = _detail(status, self._progress.get(status.step.id, {}))
        self._console.print(
            f"{clock}  {status.state.value:<8} {status.step.id}  {detail}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("step", "state", "progress", ""):
            table.add_column(heading, no_wrap=True)
        for status in self._statuses:
            progress = self._progress.get(status.step.id, {}) if status.state is State.RUNNING else {}
            total, done = progress.get("total") or 0, progress.get("done") or 0
            bar: RenderableType = ProgressBar(total=total, completed=done, width=20) if total else Text("")
            state = Text(status.state.value, style=_COLOURS[status.state])
            table.add_row(status.step.id, state, bar, _detail(status, progress))
        return Group(table)


def read_progress(root: str, status: StepStatus) -> dict[str, Any] | None:
    """The progress object of a step, if there is a readable one."""
    try:
        return storage.read_json(storage.join(status.step.output(root), "progress.json"))
    except (ItpnError, ValueError, OSError):
        return None


def plan_table(root: str, statuses: list[StepStatus]) -> Table:
    """Step, state, output and resources of every step."""
    table = Table(title=None, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("step", "state", "output", "resources"):
        table.add_column(heading, overflow="fold")
    for status in statuses:
        state = Text(status.state.value, style=_COLOURS[status.state])
        table.add_row(status.step.id, state, status.step.output(root), str(status.step.resources))
    return table


def begun(root: str, statuses: list[StepStatus]) -> dict[str, dict[str, Any]]:
    """The progress objects of the steps that have one, by step id; of training with `checkpoint`, its newest step."""

    def read(status: StepStatus) -> dict[str, Any] | None:
        progress = read_progress(root, status)
        if progress and progress.get("unit") == "steps":
            progress["checkpoint"] = max(checkpoint_steps(status.step.output(root)), default=None)
        return progress

    with ThreadPoolExecutor(16) as pool:
        found = zip(statuses, pool.map(read, statuses), strict=True)
        return {status.step.id: progress for status, progress in found if progress}


def status_table(statuses: list[StepStatus], progress: dict[str, dict[str, Any]]) -> Table:
    """State and progress (what `begun` gave) of every step; below a training step what happened in it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("step", "state", ""):
        table.add_column(heading, overflow="fold")
    for status in statuses:
        found = progress.get(status.step.id, {})
        state = Text(status.state.value, style=_COLOURS[status.state])
        table.add_row(status.step.id, state, Text(_detail(status, found)))
        for line in _watched(status, found):
            table.add_row("", "", Text(line))
    return table


def _watched(status: StepStatus, progress: dict[str, Any]) -> list[str]:
    """Of a training step: newest checkpoint, last events, where pictures and curves lie."""
    lines = []
    if "checkpoint" in progress and status.state is not State.DONE:
        step = progress["checkpoint"]
        lines.append("no checkpoint yet" if step is None else f"newest checkpoint: step {step}")
    for event in progress.get("events", [])[-_EVENTS:]:
        facts = {key: value for key, value in event.items() if key not in ("event", "step")}
        told = ", ".join(f"{k} {'; '.join(v[:3]) if isinstance(v, list) else v}" for k, v in facts.items())
        lines.append(f"step {event['step']}: {event['event']}" + (f" ({told})" if told else ""))
    if progress.get("picture"):
        lines.append(f"newest picture: {progress['picture']}")
    if progress.get("tensorboard"):
        lines.append(f"curves: tensorboard --logdir {progress['tensorboard']}")
    return lines


def results_table(rows: list[ResultRow], metric: str = "top1") -> RenderableType:
    """One line for each setting and seed, pretrained and scratch side by side; then the checkpoints."""
    shown = [row for row in rows if row.metric == metric and not row.variant]
    names = data_names(map(data_of, shown))
    pairs: dict[tuple[str, str, int], dict[str, ResultRow]] = defaultdict(dict)
    for row in shown:
        pairs[(names[data_of(row)], _setting(row), row.seed)][row.init] = row
    table = Table(title=f"{metric} ({unit(metric)})" if unit(metric) else metric, title_justify="left")
    for heading in ("data", "job"):
        table.add_column(heading)
    for heading in ("seed", "pretrained", "scratch", "gain"):
        table.add_column(heading, justify="right")
    inits = ("pretrained", "scratch")
    gains: dict[str, list[float]] = defaultdict(list)
    for (data, setting, seed), found in sorted(pairs.items()):
        values = [found[init].value if init in found else None for init in inits]
        gain = values[0] - values[1] if values[0] is not None and values[1] is not None else None
        if gain is not None:
            gains[data].append(gain)
        table.add_row(data, setting, str(seed), *(_number(v) for v in values), _number(gain, "+"))
    for data in sorted(gains):
        if len(gains[data]) > 1:
            of_data = [found for (name, _, _), found in pairs.items() if name == data]
            means = [mean(f[init].value for f in of_data if init in f) for init in inits]
            table.add_section()
            name = "mean" if len(gains) == 1 else f"mean of {data}"
            table.add_row(name, "", "", *(_number(v) for v in means), _number(mean(gains[data]), "+"))
    checkpoints = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("job", "init", "seed", metric, "checkpoint"):
        checkpoints.add_column(heading, overflow="fold", no_wrap=heading != "checkpoint")
    for key in sorted(pairs):
        for row in pairs[key].values():
            checkpoints.add_row(key[1], row.init, str(row.seed), _number(row.value), row.checkpoint)
    return Group(table, Text(""), checkpoints)


def _setting(row: ResultRow) -> str:
    """The job's name less its initialisation and seed, which have columns of their own."""
    name = row.step.split("/")[1]
    return name.removesuffix(f"-s{row.seed}").replace(f"-{row.init}", "")


def rows_table(rows: list[ResultRow]) -> Table:
    """Plain listing of result rows."""
    table = Table()
    for heading in (
        "created",
        "run",
        "data",
        "metric",
        "value",
        "variant",
        "init",
        "seed",
        "step",
        "checkpoint",
    ):
        table.add_column(
            heading, justify="right" if heading in ("value", "seed") else "left", overflow="fold"
        )
    names = data_names(map(data_of, rows))
    for row in rows:
        table.add_row(
            row.created_at[:19],
            row.run,
            names[data_of(row)],
            row.metric,
            f"{row.value:.4g}",
            row.variant,
            row.init,
            str(row.seed),
            row.step,
            row.checkpoint,
        )
    return table


def status_json(
    root: str, statuses: list[StepStatus], progress: dict[str, dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The machine-readable form of the statuses, and of what `begun` gave."""
    return [
        {
            "step": s.step.id,
            "state": s.state.value,
            "reused": s.reused,
            "output": s.step.output(root),
            "resources": str(s.step.resources),
            "fingerprint": s.step.fingerprint,
            "note": s.note,
            "error": str(s.error) if s.error else None,
            "metrics": s.record.metrics if s.record else {},
            **({"progress": progress.get(s.step.id)} if progress is not None else {}),
        }
        for s in statuses
    ]


def print_json(payload: dict[str, Any]) -> None:
    """The last line on stdout with --json: one JSON object."""
    print(json.dumps(payload), flush=True)


def _detail(status: StepStatus, progress: dict[str, Any]) -> str:
    if status.state is State.DONE and status.record:
        return ("already done" if status.reused else f"{status.record.wall_s:.0f} s") + _metrics(
            status.record.metrics
        )
    if status.state is State.FAILED and status.error:
        return status.error.message.splitlines()[0]
    if status.state is not State.RUNNING:
        return status.note
    if not progress:
        return status.note or "starting, or waiting for free CPUs and GPUs"
    eta = progress.get("eta_s")
    text = f"{progress['done']}/{progress['total']} {progress['unit']}"
    return (
        text
        + _metrics(progress.get("metrics", {}), most=10)
        + (f"  ETA {_clock(eta)}" if eta is not None else "")
    )


def _metrics(metrics: dict[str, Any], most: int = 5) -> str:
    forms = {
        "images_per_s": "{:.0f} images/s",
        "mfu": "MFU {:.0%}",
        "data_wait_share": "data wait {:.0%}",
        "epoch": "epoch {:.2f}",
    }
    shown = [
        forms.get(name, name + " {:.4g}").format(value)
        for name, value in metrics.items()
        if isinstance(value, int | float)
    ]
    return "".join("  " + item for item in shown[:most])


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
