"""What the pipeline itself costs: looking at a finished recipe, appending to the registry, reading it back.

    python bench/registry.py [--quick]

The last line is one JSON object: `survey_ms_per_step` (records of a finished graph read and checked),
`append_ms_per_row` and `read_ms_per_row` (registry on local files), medians of several repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

from cluster import storage
from cluster.resources import Resources
from pipeline.record import Record, commit
from pipeline.registry import Registry
from pipeline.runner import Runner, State
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
    quick = parser.parse_args().quick
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
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
