"""What the pipeline itself costs: looking at a finished recipe, appending to the registry, reading it back.

    python bench/registry.py [--quick] [--rows N]

The last line is one JSON object: `survey_ms_per_step` (records of a finished graph read and checked),
`append_ms_per_row` and `read_ms_per_row` (registry on local files), and with N rows (100,000; quick: 2,000) the
seconds of `itpn results list --limit 10`, a process of its own: `list_s` without a view, `list_synced_s` with one
that is up to date, `list_view_s` with `--view`, of `itpn registry sync`, and of `results best`, `show` and `compare`
(two single results) without a view and with one (`…_synced_s`). Medians of several repeats, of one without a view.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cluster import storage
from cluster.resources import Resources
from pipeline.record import Record, commit
from pipeline.registry import Registry, ResultRow
from pipeline.runner import Runner
from pipeline.status import State
from pipeline.step import Step
from stages.artifacts import CheckpointRef, EvaluationRef, Measurement, Outcome
from stages.config import Config


class BenchConfig(Config):
    number: int


def never_run(config: BenchConfig, inputs: dict, context: object) -> Outcome:
    raise AssertionError("every step of this benchmark is finished before it is looked at")


def finished(root: str, steps: int) -> tuple[list[Step], list[Record]]:
    """`steps` evaluation steps with their records written under `root`."""
    made, records = [], []
    for number in range(steps):
        step = Step(
            kind="evaluate", name=f"job-{number:05d}", fn=never_run, config=BenchConfig(number=number)
        )
        checkpoint = CheckpointRef(
            uri=f"{root}/c", sha256=f"{number:064x}", bytes=1, step=1, task="classify", dataset="bench",
            data_fingerprint="0" * 64, seed=number,
        )  # fmt: skip
        artifact = EvaluationRef(
            dataset="bench", split="val", samples=1, evaluator={}, checkpoint=checkpoint,
            measurements=[Measurement(metric="top1", value=float(number))],
        )  # fmt: skip
        record = Record(
            step=step.id, fingerprint=step.fingerprint, identity=step.identity, config=step.config.model_dump(),
            inputs={}, artifact=artifact, files=[], metrics={}, notes=[], recipe="bench", attempt="0",
            lease_token=1, code_version="0", libraries={}, host="bench", workers=Resources().workers,
            started_at="2026-01-01T00:00:00", finished_at="2026-01-01T00:00:00", wall_s=0, cpu_seconds=0,
            gpu_seconds=0,
        )  # fmt: skip
        commit(root, step, record)
        made.append(step)
        records.append(record)
    return made, records


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work` in seconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--rows", type=int, help="results in the registry that is listed")
    arguments = parser.parse_args()
    quick = arguments.quick
    count, repeats = (100, 3) if quick else (1000, 5)
    with tempfile.TemporaryDirectory(prefix="itpn-bench-") as root:
        steps, records = finished(root, count)

        def survey() -> None:
            assert all(s.state is State.DONE for s in Runner(root, "bench", steps).plan())

        def append() -> None:
            storage.delete_tree(f"{root}/registry")
            assert Registry(root).publish(records) == 2 * count  # the result, and that the run finished

        def read() -> None:
            assert len(Registry(root).results()) == count

        figures = {
            "survey_ms_per_step": round(median_s(survey, repeats) / count * 1e3, 3),
            "append_ms_per_row": round(median_s(append, repeats) / count * 1e3, 3),
            "read_ms_per_row": round(median_s(read, repeats) / count * 1e3, 3),
            "rows": count,
        }
    figures |= listing(arguments.rows or (2_000 if quick else 100_000), repeats)
    print(json.dumps(figures))


def listing(rows: int, repeats: int) -> dict[str, float]:
    """Seconds of `results list` as a user runs it, over a registry of so many results."""
    with tempfile.TemporaryDirectory(prefix="itpn-bench-") as root:
        folder = Path(root, "registry", "results")
        folder.mkdir(parents=True)
        for number in range(rows):  # written past the registry: its own fsync of each would take minutes
            row = ResultRow(
                run="bench", step=f"evaluate/job-{number:06d}/v1", dataset="bench", split="val", metric="top1",
                value=number / rows, samples=1, init="scratch", seed=number, evaluator={"batch": 64}, checkpoint="c",
                checkpoint_sha256=f"{number:064x}", pretrain=None, training_fingerprint=None, data_fingerprint="f",
                code_version="v", created_at="2026-01-01T00:00:00",
            )  # fmt: skip
            (folder / f"{row.id}.json").write_bytes(storage.canonical_json(row.model_dump(mode="json")))

        def itpn(*command: str) -> None:
            full = [sys.executable, "-m", "pipeline", *command, "--root", root, "--json"]
            subprocess.run(full, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        listed = partial(itpn, "results", "list", "--limit", "10")
        asked = {
            "list": listed,
            "best": partial(itpn, "results", "best", "--metric", "top1"),
            "show": partial(itpn, "results", "show", row.id),
            "compare": partial(itpn, "results", "compare", "seed=1", f"seed={rows - 1}"),
        }
        figures = {"listed_rows": float(rows)}
        figures |= {f"{name}_s": median_s(work, 1) for name, work in asked.items()}
        figures["sync_s"] = median_s(partial(itpn, "registry", "sync"), 1)
        figures |= {f"{name}_synced_s": median_s(work, repeats) for name, work in asked.items()}
        figures["list_view_s"] = median_s(partial(listed, "--view"), repeats)
        return {name: round(value, 2) for name, value in figures.items()}


if __name__ == "__main__":
    main()
