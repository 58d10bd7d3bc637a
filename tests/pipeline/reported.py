"""A root for tests of the report, made by the real runner, with a step in every state and text that is markup."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from cluster import storage
from cluster.errors import DataInvalid
from pipeline import record as records
from pipeline.registry import Registry, ResultRow
from pipeline.registry.aliases import Aliases
from pipeline.registry.events import RunRow
from pipeline.registry.lineage import find
from pipeline.runner import Runner
from pipeline.step import Step
from stages.artifacts import CheckpointRef, DatasetRef, EvaluationRef, FileInfo, Measurement, Outcome
from stages.config import Config
from stages.context import StageContext
from tests.pipeline import toys

EVIL = """<script>document.title = "broken"</script>'"&<b onclick=alert(1)>"""
EVIL_NAME = "<img src=x onerror=alert(1)>"  # of a step: without a slash
STEPS = 40


class MadeConfig(Config):
    seed: int = 0
    init: str = "scratch"
    text: str = EVIL


class TakenConfig(MadeConfig):
    uri: str = ""


def shard(config: MadeConfig, inputs: Mapping[str, Any], context: StageContext) -> Outcome:
    info = _write(context, "manifest.json", b"{}")
    uri = storage.join(context.out, info.path)
    reference = DatasetRef(
        name="toys", manifest=uri, sha256=info.sha256, fingerprint="d" * 64, splits={"val": 10}, num_classes=2
    )
    return Outcome(artifact=reference, files=[info])


def train(config: MadeConfig, inputs: Mapping[str, Any], context: StageContext) -> Outcome:
    files = [
        _write(context, "weights", f"{config}".encode()),
        _write(context, "metrics.jsonl", metric_text(config.seed)),
    ]
    for step, shade in ((10, 60), (20, 120), (40, 180)):
        uri = storage.join(context.out, "pictures", f"{step:09d}-{context.attempt}.png")
        storage.write_exclusive(uri, picture(shade))
    started = inputs.get("start")
    reference = CheckpointRef(
        uri=storage.join(context.out, files[0].path), sha256=files[0].sha256, bytes=files[0].bytes, step=STEPS,
        task="classify", dataset="toys", data_fingerprint="d" * 64, seed=config.seed, init=config.init,
        pretrain=started.uri if started else None, teacher_sha256=None if started else "e" * 64,
    )  # fmt: skip
    return Outcome(artifact=reference, files=files, metrics={"images_per_s": 1234.5}, notes=[EVIL])


def evaluate(config: MadeConfig, inputs: Mapping[str, Any], context: StageContext) -> Outcome:
    found = [
        Measurement(metric="top1", value=60.0 + config.seed),
        Measurement(metric="loss", value=2.0 - config.seed),
    ]
    found.append(Measurement(metric=EVIL, value=1e-7))
    for batch in (1, 64):
        speed = {"batch": batch, "resolution": 224}
        found.append(Measurement(metric="images_per_s", value=90.0 * batch, evaluator=speed, on_data=False))
        found.append(Measurement(metric="flops", value=3.5e9, evaluator=speed, on_data=False))
    reference = EvaluationRef(
        dataset="toys", split="val", samples=10, evaluator={}, checkpoint=inputs["checkpoint"], measurements=found
    )  # fmt: skip
    return Outcome(artifact=reference, files=[])


def fail(config: MadeConfig, inputs: Mapping[str, Any], context: StageContext) -> Outcome:
    raise DataInvalid(EVIL, expected="good data", found="bad data", remedy="mend them")


def make(root: str) -> str:
    """Run it; returns the root.

    shard → pretrain → two fine-tunings → an evaluation each; a fine-tuning that fails, its evaluation that is
    skipped, one that was interrupted; the alias `production`; a run whose very name is markup.
    """
    data = Step(kind="shard", name="toys", fn=shard, config=MadeConfig())
    base = Step(kind="pretrain", name="base", fn=train, config=MadeConfig(), inputs={"data": data})
    steps = []
    for seed, name in ((0, "a"), (1, EVIL_NAME)):
        config = MadeConfig(seed=seed, init="pretrained")
        trained = Step(
            kind="finetune", name=name, fn=train, config=config, inputs={"data": data, "start": base}
        )
        inputs = {"data": data, "checkpoint": trained}
        steps.append(Step(kind="evaluate", name=name, fn=evaluate, config=config, inputs=inputs))
    broken = Step(kind="finetune", name="broken", fn=fail, config=MadeConfig(), inputs={"data": data})
    skipped = Step(
        kind="evaluate", name="broken", fn=evaluate, config=MadeConfig(), inputs={"checkpoint": broken}
    )
    Runner(root, EVIL, [*steps, skipped], open_session=toys.ThreadSession).run()
    registry = Registry(root)
    Aliases(registry).promote(find(registry, "finetune/a/v1"), "production")
    registry.publish_run(
        RunRow(
            run=EVIL, step=EVIL, code_version="v", created_at="2026-01-01T00:00:00+00:00", fingerprint="0",
            outcome="skipped", error=EVIL, exit_code=1, host=EVIL,
        )
    )  # fmt: skip
    unfinished(root, "cut", data)
    return root


def unfinished(root: str, name: str, data: Step) -> str:
    """A training that has come to its first checkpoint; returns the URI of its output folder."""
    step = Step(kind="finetune", name=name, fn=train, config=MadeConfig(), inputs={"data": data})
    records.begin(root, step)
    out = step.output(root)
    storage.write_exclusive(storage.join(out, "metrics", "000000040-x.jsonl"), metric_text(3))
    manifest = {"metrics": [{"path": "metrics/000000040-x.jsonl"}]}
    storage.write_json_exclusive(storage.join(out, "checkpoints", "000000040.json"), manifest)
    progress = {"state": "running", "done": 40, "total": 80, "unit": "steps", "eta_s": 75.0, "metrics": {}}
    storage.overwrite(storage.join(out, "progress.json"), storage.canonical_json(progress))
    return out


def metric_text(seed: int) -> bytes:
    """What a training of STEPS steps writes: two heads, a step that was not applied, and a roll-back."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = 2.5 * math.exp(-step / 15) + 0.1 * seed
        lines.append(
            {
                "step": step, "epoch": 0, "loss": loss if step != 20 else "nan", "loss_pyramid": 0.6 * loss,
                "loss_auxiliary": 0.4 * loss, "lr": 1e-3 * math.cos(step / 30), "grad_norm": 1 / step,
                "images_per_s": 1200.0 + step % 7, "data_wait_share": 0.02, "memory_bytes": 2e9, "applied": step != 20,
                EVIL: 1.0 / step,
            }
        )  # fmt: skip
        if step == 20:
            lines.append({"event": "step not applied", "step": 20, "reason": EVIL})
            lines.append({"event": "rolled back", "step": 20, "to": 10, "reason": "loss not finite"})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def picture(shade: int) -> bytes:
    """A small PNG."""
    sink = io.BytesIO()
    Image.linear_gradient("L").resize((192, 72)).point(lambda v: (v + shade) % 256).save(sink, "PNG")
    return sink.getvalue()


def _write(context: StageContext, name: str, data: bytes) -> FileInfo:
    uri = storage.join(context.files, name)
    storage.write_exclusive(uri, data)
    return FileInfo(
        path=uri.removeprefix(context.out + "/"), bytes=len(data), sha256=storage.sha256_bytes(data)
    )


def many(root: str, count: int) -> str:
    """A root with so many results of as many weights; returns it."""
    row = ResultRow(
        run="many", step="evaluate/a/v1", code_version="c", created_at="2026-01-01T00:00:00+00:00", dataset="toys",
        split="val", metric="top1", value=0.0, samples=10, init="scratch", seed=0, evaluator={}, checkpoint="x",
        checkpoint_sha256="", pretrain=None, training_fingerprint=None, data_fingerprint="d",
    )  # fmt: skip
    facts = ({"value": n / 100, "seed": n, "checkpoint_sha256": f"{n:064d}"} for n in range(count))
    Registry(root).append([("results", row.model_copy(update=fact)) for fact in facts])
    return root
