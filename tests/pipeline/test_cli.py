"""The command line as a user meets it: help, JSON, and every wrong input with its message and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def itpn(*arguments: str, cwd: Path = REPOSITORY, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ITPN_", "AWS_", "RAY_"))}
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd, env=clean | {"PYTHONPATH": str(REPOSITORY)} | env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "command",
    [["run"], ["status"], ["doctor"], ["results", "list"], ["results", "best"], ["runs", "list"]],
    ids=" ".join,
)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    done = itpn(*command, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout and "--json" in done.stdout


def test_dry_run_prints_step_state_output_and_resources(tmp_path: Path) -> None:
    done = itpn("run", "demo", "--root", str(tmp_path), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    steps = last_json(done)["steps"]
    assert [s["state"] for s in steps] == ["to do"] * len(steps)
    kinds = [s["step"].split("/")[0] for s in steps]
    assert kinds.count("finetune") >= 4 and kinds.count("evaluate") == kinds.count("finetune") + 1
    assert steps[0]["output"].startswith(str(tmp_path)) and "CPU" in steps[0]["resources"]
    assert "to do" in done.stderr and not any(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "dem", "--root", "x"], "did you mean 'demo'"),
        (["run", "demo", "--root", "x", "--set", "pretrain.schedule.stepz=3"], "did you mean 'steps'"),
        (["run", "demo", "--root", "x", "--set", "sedes=[1]"], "did you mean 'seeds'"),
        (["run", "demo", "--root", "x", "--set", "seeds"], "KEY=VALUE"),
        (["run", "demo", "--root", "x", "--only", "pretrian/demo"], "did you mean"),
        (["run", "demo"], "--root URI"),
        (["results", "list"], "--root URI"),
        (["results", "best", "--root", "empty", "--metric", "top1"], "no result with metric 'top1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_told_with_a_remedy_and_code_2(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    done = itpn(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "remedy" in done.stderr or "expected" in done.stderr


def test_error_with_json_is_an_object_on_stdout(tmp_path: Path) -> None:
    done = itpn("run", "dem", "--root", str(tmp_path), "--json")
    assert last_json(done) | {"error": ""} == {"ok": False, "exit_code": 2, "error": ""}


def test_missing_source_folder_is_named(tmp_path: Path) -> None:
    done = itpn("run", "demo", "--root", str(tmp_path), "--set", "data.source=/no/such/folder")
    assert done.returncode == 2
    assert "/no/such/folder" in done.stderr


def test_pretrain_large_lists_everything_that_is_missing() -> None:
    done = itpn("run", "pretrain_large")
    assert done.returncode == 2
    for thing in ("GPUs", "data set", "teacher", "root"):
        assert thing in done.stderr
    assert done.stderr.count("remedy:") == 4


def test_root_that_does_not_answer_is_listed_with_all_else_that_is_missing() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "ITPN_STORAGE_DEADLINE_S": "3"}
    done = itpn("run", "pretrain_large", "--root", "s3://nowhere/x", **keys, **nobody)
    assert done.returncode == 2, done.stderr
    assert "4 things are missing" in done.stderr


def test_only_what_the_chosen_steps_need_is_asked_for(tmp_path: Path) -> None:
    done = itpn("run", "pretrain_large", "--root", str(tmp_path), "--only", "shard")
    assert done.returncode == 2
    assert "data set" in done.stderr and "GPUs" not in done.stderr and "teacher" not in done.stderr


def test_brackets_in_a_root_are_no_markup(tmp_path: Path) -> None:
    done = itpn("results", "list", "--root", str(tmp_path / "[" / "x]"))
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_doctor_reports_each_check_and_its_remedy(tmp_path: Path) -> None:
    good = itpn("doctor", "--root", str(tmp_path), "--json")
    assert good.returncode == 0, good.stderr
    assert last_json(good)["ok"] is True
    bad = itpn("doctor", "pretrain_large", "--root", str(tmp_path), "--json")
    assert bad.returncode == 2
    missing = [check["name"] for check in last_json(bad)["checks"] if not check["ok"]]
    assert missing == ["GPUs", "data set", "teacher"]


def test_unreachable_store_is_code_4() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "ITPN_STORAGE_DEADLINE_S": "3"}
    done = itpn("status", "demo", "--root", "s3://nowhere/x", **keys, **nobody)
    assert done.returncode == 4, done.stderr
    assert "remedy" in done.stderr


def test_looking_at_a_registry_does_not_wait_for_torch_or_ray(tmp_path: Path) -> None:
    """Each takes a second or more; `results list` of 100,000 rows is to take less than two."""
    program = (
        "import sys; sys.argv = ['itpn', 'results', 'list', '--root', sys.argv[1], '--json']\n"
        "from pipeline.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert '"ok": true' in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stdout
