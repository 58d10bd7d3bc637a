"""The pages of a report: which there are, and the bytes of each. Both the folder and the server are made of it.

Pages are jinja2 templates with autoescape; data for charts are JSON in data blocks. A Content-Security-Policy
in every page refuses scripts in the page's text and everything from other places. Needs the extra `report`.
"""

from __future__ import annotations

import io
import json
import pkgutil
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.csv

from cluster import storage
from cluster.errors import NotFound, PreflightError
from pipeline import written
from pipeline.registry import ResultRow, Rows, metrics
from pipeline.registry.evaluated import clashing, data_names, data_of
from pipeline.report import charts, graph, tables
from pipeline.report.read import Snapshot, StepInfo, metric_lines, pictures

TEMPLATES = Path(__file__).parent / "templates"
ROWS = 1000  # of a table; all of them are in the CSV
PICTURES = 12  # of a step's page
NODES = 150  # of the lineage graph; fewer around one step
NODES_OF_STEP = 40
EVENTS = 500
KINDS = ("shard", "pretrain", "import", "finetune", "evaluate")  # have a colour of their own
PNG = b"\x89PNG\r\n\x1a\n"
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*")


class Site:
    """The pages of one snapshot.

    Args:
        snapshot: what is shown.
        live_s: pages ask for news every so many seconds; 0 for pages in a folder.
        problem: shown atop every page.

    Raises PreflightError when plotly or jinja2 is not installed.
    """

    def __init__(self, snapshot: Snapshot, *, live_s: int = 0, problem: str = "") -> None:
        self.snapshot, self.problem = snapshot, problem
        self._environment = _environment()
        self.page_of = {step: f"steps/{slug(step)}.html" for step in snapshot.steps}
        # Weights that were taken in again belong to the step that made them first.
        self._trained = {row.checkpoint.sha256: row.step for row in reversed(snapshot.checkpoints)}
        self._graph = graph.made_from({step: info.inputs.values() for step, info in snapshot.steps.items()})
        self._environment.globals |= {
            "root": snapshot.root, "steps": snapshot.steps, "page_of": self.page_of, "live_s": live_s,
            "problem": problem, "aliases_of": snapshot.aliases_of, "deleted": snapshot.deleted, "most_rows": ROWS,
            "all_kinds": KINDS, "data_name": self._data_name,
        }  # fmt: skip
        self._data_names = data_names(map(data_of, snapshot.results))
        self._makers: dict[str, Callable[[], bytes | None]] = {
            "index.html": self._index,
            "results.html": self._results,
            "runs.html": self._runs,
            "checkpoints.html": self._checkpoints,
            "lineage.html": self._lineage,
            "results.csv": self._csv,
            "plotly.min.js": plotly_js,
        }
        for name in ("page.js", "style.css"):
            self._makers[name] = partial((TEMPLATES / name).read_bytes)
        for step, info in snapshot.steps.items():
            self._makers[self.page_of[step]] = partial(self._step, info)
            for path, uri in self._pictures(info).items():
                self._makers[path] = partial(_png, uri)

    def paths(self) -> list[str]:
        """Every file of the report, relative to its folder."""
        return list(self._makers)

    def read(self, path: str) -> bytes | None:
        """The bytes of one file; None when there is none of this name, or a picture is gone.

        Raises StorageUnavailable when the store does not answer.
        """
        maker = self._makers.get(path)
        try:
            return maker() if maker else None
        except NotFound:
            return None

    def _page(self, template: str, base: str = "", **values: Any) -> bytes:
        return self._environment.get_template(template).render(base=base, **values).encode()

    def _index(self) -> bytes:
        rows = self.snapshot.results
        columns, lines = tables.leaderboard(rows, self._trained)
        speed = charts.accuracy_speed(
            rows, lambda row: self.page_of.get(self._trained.get(row.checkpoint_sha256, row.step))
        )
        states = [info.state for info in self.snapshot.steps.values()]
        counts = {state: states.count(state) for state in sorted(set(states), key=_STATES.index)}
        return self._page(
            "index.html", page="index.html", metrics=columns, lines=lines, charts=speed, counts=counts,
            different_data=clashing(self._data_names), more_metrics=tables.metrics_of(rows)[tables.METRICS :],
        )  # fmt: skip

    def _results(self) -> bytes:
        newest = self.snapshot.results[::-1]
        return self._page("results.html", page="results.html", results=newest)

    def _runs(self) -> bytes:
        infos = sorted(self.snapshot.steps.values(), key=lambda i: (i.ended_at or "9", i.step), reverse=True)
        any_gpu = any(info.gpu_seconds for info in infos)
        return self._page("runs.html", page="runs.html", infos=infos, any_gpu=any_gpu)

    def _checkpoints(self) -> bytes:
        return self._page(
            "checkpoints.html", page="checkpoints.html", checkpoints=self.snapshot.checkpoints[::-1],
            aliases=[alias for _, alias in sorted(self.snapshot.aliases.items())],
        )  # fmt: skip

    def _lineage(self) -> bytes:
        kept, total = set(self._graph), len(self._graph)
        if total > NODES:
            kept = set()
            starts = [alias.current.step for alias in self.snapshot.aliases.values()]
            infos = sorted(self.snapshot.steps.values(), key=lambda info: info.ended_at, reverse=True)
            for step in [*starts, *(info.step for info in infos)]:
                if step in self._graph and len(kept) < NODES:
                    kept |= graph.around(self._graph, step, 1)
        drawn = self._drawn(kept)
        kinds = [kind for kind in KINDS if any(step.startswith(f"{kind}/") for step in kept)]
        return self._page(
            "lineage.html", page="lineage.html", drawn=drawn, total=total, shown=len(kept), kinds=kinds
        )

    def _step(self, info: StepInfo) -> bytes:
        snapshot, record = self.snapshot, info.record
        lines = metric_lines(snapshot, info)
        made = {row.checkpoint.sha256 for row in snapshot.checkpoints if row.step == info.step}
        results = [row for row in snapshot.results if row.step == info.step or row.checkpoint_sha256 in made][
            ::-1
        ]
        happened = charts.events(lines)
        near = graph.around(self._graph, info.step, NODES_OF_STEP)
        origins = [snapshot.steps[s] for s in self._origins(info.step) if s in snapshot.steps]
        return self._page(
            "step.html", base="../", page="runs.html", info=info, record=record, results=results,
            charts=charts.curves(lines), events=happened[-EVENTS:], all_events=len(happened),
            pictures=[path.removeprefix("steps/") for path in self._pictures(info)],
            drawn=self._drawn(near), origins=origins,
            config=json.dumps(record.config, indent=2) if record else "",
        )  # fmt: skip

    def _data_name(self, row: ResultRow) -> str:
        return self._data_names[data_of(row)]

    def _origins(self, step: str) -> list[str]:
        import networkx as nx

        kept = self._graph.subgraph({step} | nx.ancestors(self._graph, step))
        return list(nx.topological_sort(kept))

    def _drawn(self, steps: set[str]) -> dict[str, Any]:
        layout = graph.draw(self._graph.subgraph(steps))
        return {"layout": layout, "box": (graph.BOX_W, graph.BOX_H)}

    def _pictures(self, info: StepInfo) -> dict[str, str]:
        """Path in the report -> URI, in the order in which they were taken; evenly thinned out."""
        found = list(pictures(self.snapshot, info).items())
        every = -(-len(found) // PICTURES) or 1
        kept = found[::-every][::-1]
        folder = self.page_of[info.step].removesuffix(".html")
        return {f"{folder}/{number:09d}.png": uri for number, uri in kept}

    def _csv(self) -> bytes:
        sink = io.BytesIO()
        rows: Rows[ResultRow] = Rows(self.snapshot.results, "results")
        pyarrow.csv.write_csv(rows.to_arrow(), sink)
        return sink.getvalue()


_STATES = ["finished", "running", "interrupted", "failed", "skipped", "damaged"]


def slug(step: str) -> str:
    """A step's id as a file name; ids that could clash, or hold more than letters, digits, `._-`, get a hash."""
    parts = step.split("/")
    if len(step) <= 120 and all(PLAIN.fullmatch(part) for part in parts):
        return "--".join(parts)
    kept = re.sub(r"[^A-Za-z0-9]+", "-", step)[:60].strip("-")
    return f"{kept}--{storage.sha256_bytes(step.encode())[:16]}"


def plotly_js() -> bytes:
    """The bundled plotly.js. Raises PreflightError when plotly is not installed."""
    try:
        data = pkgutil.get_data("plotly", "package_data/plotly.min.js")
    except ImportError:
        data = None
    if data is None:
        raise _missing("plotly")
    return data


def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise _missing("jinja2") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {
        "measure": metrics.measure, "unit": metrics.unit, "heading_unit": metrics.heading_unit,
        "direction": metrics.known_direction, "plain": written.plain, "size": written.size,
        "duration": written.duration, "moment": written.moment,
    }  # fmt: skip
    return environment


def _missing(name: str) -> PreflightError:
    return PreflightError(
        f"the report needs {name}", found="it is not installed", remedy="pip install 'itpn-pipeline[report]'"
    )


def _png(uri: str) -> bytes | None:
    data = storage.read_bytes(uri)
    return data if data.startswith(PNG) else None
