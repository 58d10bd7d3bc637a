"""The demo recipe, cut to a few steps, as a user runs it: a fresh process each time, a real Ray, real training."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import storage
from pipeline.registry import Registry, garbage
from pipeline.registry.compare import compare
from pipeline.registry.lineage import find, lineage, verify
from pipeline.registry.retention import Retention

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    "pretrain.schedule.steps=4",
    "pretrain.schedule.warmup_steps=1",
    "pretrain.checkpoint.save_every_steps=2",
    "pretrain.global_batch=8",
    "finetune.schedule.steps=3",
    "finetune.schedule.warmup_steps=1",
    "finetune.global_batch=8",
    "seeds=[0]",
]


def command(root: str, *extra: str) -> list[str]:
    settings = [part for item in SMALL for part in ("--set", item)]
    return [sys.executable, "-m", "pipeline", "run", "demo", "--root", root, "--json", *settings, *extra]


def start(root: str, *extra: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(root, *extra), cwd=REPOSITORY, env=os.environ | env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.strip().splitlines()[-1])


def attempts(root: str, step: str) -> int:
    """How many attempts left files under the step's output."""
    prefix = storage.join(root, step, "attempts")
    return len({item.uri.removeprefix(prefix).split("/")[1] for item in storage.list_files(prefix)})


@pytest.mark.timeout(420)
def test_chain_runs_registers_and_is_recognised_as_done(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    first = finish(start(root))
    assert {step["state"] for step in first["steps"]} == {"done"}
    top1 = {row["init"]: row for row in first["results"] if row["metric"] == "top1"}
    assert set(top1) == {"pretrained", "scratch"}
    for row in top1.values():
        assert 0 <= row["value"] <= 100 and row["dataset"] == "clipart-12" and row["split"] == "val"
        assert storage.sha256_bytes(storage.read_bytes(row["checkpoint"])) == row["checkpoint_sha256"]
    assert storage.exists(top1["pretrained"]["pretrain"]) and top1["scratch"]["pretrain"] is None

    registry_holds_what_the_chain_did(root, top1)
    gc_leaves_only_what_the_registry_needs(root)
    second = finish(start(root))
    assert all(step["reused"] for step in second["steps"])
    assert second["results"] == first["results"]


def registry_holds_what_the_chain_did(root: str, top1: dict[str, dict]) -> None:
    """Differences and lineage, against the rows and records themselves."""
    registry = Registry(root)
    found = compare(registry, [top1["scratch"]["step"], top1["pretrained"]["step"]])
    line = next(m for m in found["metrics"] if m["metric"] == "top1" and not m["variant"])
    assert line["groups"][1]["delta"] == pytest.approx(top1["pretrained"]["value"] - top1["scratch"]["value"])
    assert found["data"][0] == found["data"][1], "trained on the same data"
    assert {d["field"] for d in found["config"]} == {"init"}, "only one of them was pre-trained"

    step = find(registry, top1["pretrained"]["checkpoint_sha256"]).step
    node = lineage(root, step)
    assert node["checkpoint"]["uri"] == top1["pretrained"]["checkpoint"]
    pretrained, data = node["inputs"]["init"], node["inputs"]["data"]
    assert pretrained["checkpoint"]["uri"] == top1["pretrained"]["pretrain"]
    assert pretrained["checkpoint"]["teacher_sha256"] and pretrained["config"]["schedule"]["steps"] == 4
    assert pretrained["inputs"]["data"] == data and data["dataset"]["name"] == "clipart-12"
    manifest = storage.read_bytes(data["dataset"]["manifest"])
    assert storage.sha256_bytes(manifest) == data["dataset"]["sha256"]
    assert data["dataset"]["fingerprint"] == top1["pretrained"]["data_fingerprint"]
    for part in (node, pretrained, data):
        recorded = storage.read_json(f"{root}/{part['step']}/record.json")
        assert (part["code_version"], part["config"]) == (recorded["code_version"], recorded["config"])


def gc_leaves_only_what_the_registry_needs(root: str) -> None:
    """Training checkpoints of finished steps go, most of the bytes; nothing that a record names does."""
    registry = Registry(root)
    groups = garbage.collect(registry, lambda recipe: Retention())
    assert {group.kind for group in groups if group.delete} == {"training state"}
    assert not any("/checkpoints/" in item.uri for item in storage.list_files(f"{root}/pretrain"))
    findings = verify(registry, registry.checkpoints())
    assert len(findings) > 3 and all(finding["ok"] for finding in findings)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the whole process group; the processes that Ray put elsewhere must follow by themselves."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive


def wait_until_at_work(process: subprocess.Popen[str], root: str, step: str) -> None:
    """Return when this process (not one that was killed before) has reported progress of the step."""
    began, deadline = time.time(), time.monotonic() + 300
    while True:
        uri = f"{root}/{step}/v1/progress.json"
        if storage.exists(uri) and storage.read_json(uri)["at"] > began:
            return
        # In this order: between the two looks a short step may be over, and the run as well.
        assert process.poll() is None, f"the run ended before {step} was at work"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_any_stage_and_run_again_gives_the_same_results(tmp_path: Path) -> None:
    undisturbed = finish(start(str(tmp_path / "undisturbed")))
    root = str(tmp_path / "killed")
    delays = random.Random(7)
    finished: dict[str, bytes] = {}

    def records() -> dict[str, bytes]:
        found = (item.uri for item in storage.list_files(root))
        return {uri: storage.read_bytes(uri) for uri in found if uri.endswith("/record.json")}

    for step in (
        "shard/clipart-12",
        "pretrain/demo",
        "finetune/demo-pretrained-s0",
        "evaluate/demo-pretrained-s0",
    ):
        process = start(root)
        wait_until_at_work(process, root, step)
        time.sleep(delays.uniform(0.0, 0.5))
        kill_group(process)
        now = records()
        assert finished.items() <= now.items(), "a finished step was done again"
        finished = now
    resumed = finish(start(root))
    assert finished.items() <= records().items(), "a finished step was done again"

    def figures(done: dict) -> dict[tuple, float]:
        stable = {"top1", "top5", "loss"}
        return {(r["step"], r["metric"]): r["value"] for r in done["results"] if r["metric"] in stable}

    assert figures(resumed) == figures(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_runs_started_together_make_one_training(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    pair = [start(root), start(root)]
    results = [finish(process)["results"] for process in pair]
    assert results[0] == results[1]
    assert attempts(root, "pretrain/demo/v1") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chain_runs_on_a_real_s3_server(seaweedfs_root: str) -> None:
    done = finish(start(seaweedfs_root))
    assert {step["state"] for step in done["steps"]} == {"done"}
    assert all(row["checkpoint"].startswith("s3://") for row in done["results"])
