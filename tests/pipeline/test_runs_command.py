"""`itpn runs`: what ended how, failures and skips too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.runner import Runner
from tests.pipeline import toys


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    Runner(str(root), "toy", toys.chain(fail="ours"), open_session=toys.ThreadSession).run()
    return root


def itpn(*arguments: str):
    return CliRunner().invoke(app, ["runs", *arguments])


def test_failed_and_skipped_steps_are_listed_with_their_cause(root: Path) -> None:
    done = itpn("list", "--root", str(root), "--where", "outcome!=finished", "--json")
    rows = {row["step"]: row for row in json.loads(done.stdout.splitlines()[-1])["runs"]}
    assert {step: row["outcome"] for step, row in rows.items()} == {
        "finetune/a/v1": "failed",
        "evaluate/a/v1": "skipped",
    }
    assert rows["finetune/a/v1"]["exit_code"] == 5 and "mend them" in rows["finetune/a/v1"]["error"]


def test_table_is_for_people_and_filters_by_outcome(root: Path) -> None:
    done = itpn("list", "--root", str(root), "--outcome", "skipped")
    assert done.exit_code == 0, done.output
    assert "its input finetune/a/v1 failed" in done.stdout and "finetune/b/v1" not in done.stdout


def test_empty_registry_and_wrong_field_are_told(tmp_path: Path, root: Path) -> None:
    assert "no runs under" in itpn("list", "--root", str(tmp_path)).stderr
    wrong = itpn("list", "--root", str(root), "--where", "outcom=failed")
    assert wrong.exit_code == 2 and "did you mean 'outcome'" in wrong.stderr
    unknown = itpn("list", "--root", str(root), "--outcome", "faild")
    assert unknown.exit_code == 2 and "did you mean 'failed'" in unknown.stderr
    assert "none of the 4 runs" in itpn("list", "--root", str(root), "--outcome", "stopped").stderr
