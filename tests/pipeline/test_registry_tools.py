"""Results, checkpoints and aliases as platform teams use them, on the records of a toy chain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster import storage
from cluster.errors import ConfigError, NotFound, PreflightError
from pipeline.cli import app
from pipeline.registry import Registry, ResultRow
from pipeline.registry.aliases import Aliases, RuleRefused
from pipeline.registry.compare import compare
from pipeline.registry.delta import read, sync
from pipeline.registry.lineage import find, lineage, verify
from pipeline.registry.rows import select
from pipeline.registry.rules import check_rule
from pipeline.runner import Runner
from tests.pipeline import toys


@pytest.fixture
def root(tmp_path: Path) -> str:
    uri = str(tmp_path / "root")
    Runner(uri, "toy", toys.chain(), open_session=toys.ThreadSession).run()
    return uri


def itpn(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"code": done.exit_code}


def row(number: int) -> ResultRow:
    return ResultRow(
        run="many", step=f"evaluate/n{number}/v1", dataset="d", split="val", metric="top1", value=number / 2,
        samples=1, init="scratch", seed=number, evaluator={}, checkpoint="c", checkpoint_sha256=f"{number:064x}",
        pretrain=None, training_fingerprint=None, data_fingerprint="f", code_version="v",
        created_at=f"2026-01-01T00:00:{number:06d}",
    )  # fmt: skip


def test_results_become_a_data_frame_with_a_row_for_each(root: str) -> None:
    frame = Registry(root).results().to_pandas()
    assert len(frame) == 4 and set(frame["metric"]) == {"top1", "loss"}
    assert frame["id"].is_unique


def test_list_filters_sorts_and_limits(root: str, tmp_path: Path) -> None:
    found = itpn("results", "list", "--root", root, "--where", "value>=1", "--sort", "-value", "--limit", "1")
    assert [r["value"] for r in found["results"]] == [3.0]
    assert isinstance(found["results"][0]["evaluator"], dict)
    arguments = [
        "results",
        "list",
        "--root",
        root,
        "--metric",
        "top1",
        "--columns",
        "step,value",
        "--sort",
        "step",
        "--csv",
    ]
    csv = CliRunner().invoke(app, arguments)
    assert csv.stdout.splitlines() == ['"step","value"', '"evaluate/a/v1",3', '"evaluate/b/v1",1'], csv.stdout
    file = tmp_path / "rows.parquet"
    itpn("results", "list", "--root", root, "--parquet", str(file))
    import pyarrow.parquet as pq

    assert pq.read_table(file).num_rows == 4


@pytest.mark.parametrize("condition", ["valeu>1", "value", "value>x"])
def test_bad_condition_is_told(root: str, condition: str) -> None:
    with pytest.raises(ConfigError):
        select(Registry(root).results().to_arrow(), [condition])


def test_compare_gives_deltas_and_the_fields_that_differ(root: str) -> None:
    found = compare(Registry(root), ["init=scratch", "init=pretrained"])
    top1 = next(m for m in found["metrics"] if m["metric"] == "top1")
    assert top1["groups"][1]["delta"] == 2.0 and top1["groups"][1]["better"] is True
    assert {d["field"]: d["values"] for d in found["config"]}["train.value"] == [1.0, 3.0]
    loss = next(m for m in found["metrics"] if m["metric"] == "loss")
    assert loss["groups"][1]["better"] is True, "lower is better"


def test_checkpoint_is_found_by_step_sha256_and_alias_with_its_lineage(root: str) -> None:
    registry = Registry(root)
    by_step = find(registry, "finetune/a/v1")
    assert find(registry, by_step.checkpoint.sha256[:8]) == by_step
    Aliases(registry).promote(by_step, "production")
    assert find(registry, "production") == by_step
    node = lineage(root, "evaluate/a/v1")
    assert node["inputs"]["checkpoint"]["step"] == "finetune/a/v1"
    assert itpn("checkpoints", "show", "production", "--root", root)["aliases"] == ["production"]
    with pytest.raises(ConfigError, match="no checkpoint is called"):
        find(registry, "finetune/c/v1")


def test_verify_names_the_damaged_and_the_missing_file(root: str) -> None:
    registry = Registry(root)
    assert all(f["ok"] for f in verify(registry, registry.checkpoints()))
    storage.overwrite(find(registry, "finetune/a/v1").checkpoint.uri, b"9.0")
    storage.delete(find(registry, "finetune/b/v1").checkpoint.uri)
    found = itpn("checkpoints", "verify", "--root", root)
    assert found["code"] == 5
    assert ["sha256" in f["found"] or "not there" in f["found"] for f in found["files"]] == [True, True]


def test_rule_refuses_what_is_worse_than_production(root: str) -> None:
    registry, rule = Registry(root), "toy/val/top1 >= production - 0.5"
    aliases = Aliases(registry)
    aliases.promote(find(registry, "finetune/a/v1"), "production", rule)
    with pytest.raises(RuleRefused, match=r"top1 1 against 2\.5"):
        aliases.promote(find(registry, "finetune/b/v1"), "production", rule)
    assert (
        itpn("checkpoints", "promote", "finetune/b/v1", "production", "--root", root, "--rule", "x")["code"]
        == 2
    )
    assert len(aliases.get("production").moves) == 1  # type: ignore[union-attr]


def test_rollback_does_not_undo_a_move_that_came_between(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(root)
    aliases, a, b = Aliases(registry), find(registry, "finetune/a/v1"), find(registry, "finetune/b/v1")
    aliases.promote(a, "production")
    aliases.promote(b, "production")
    real, between = storage.replace_if, []

    def replace_if(uri: str, data: bytes, version: str) -> bool:
        if not between:
            between.append(uri)
            Aliases(registry).promote(a, "production")
        return real(uri, data, version)

    monkeypatch.setattr(storage, "replace_if", replace_if)
    with pytest.raises(ConfigError, match="was moved meanwhile"):
        aliases.rollback("production")
    alias = aliases.get("production")
    assert alias and [move.step for move in alias.moves] == [a.step, b.step, a.step]


def test_verify_does_not_trust_a_record_that_was_replaced_with_its_weights(root: str) -> None:
    registry = Registry(root)
    row = find(registry, "finetune/a/v1")
    uri = storage.join(root, row.step, "record.json")
    record = storage.read_json(uri)
    weights = next(info for info in record["files"] if info["sha256"] == row.checkpoint.sha256)
    storage.overwrite(row.checkpoint.uri, b"other weights")
    weights |= {"sha256": storage.sha256_bytes(b"other weights"), "bytes": len(b"other weights")}
    storage.overwrite(uri, storage.canonical_json(record))
    [bad] = [finding for finding in verify(registry, [row]) if not finding["ok"]]
    assert bad["path"] == "record.json" and "names no file with the sha256" in bad["found"]


def test_rule_names_an_alias_that_exists_or_is_the_one_moved(root: str) -> None:
    registry = Registry(root)
    rows = registry.results()
    worse, better = (
        next(r.checkpoint_sha256 for r in rows if r.metric == "top1" and r.init == init)
        for init in ("scratch", "pretrained")
    )
    known = {"production": better}
    for rule in ("toy/val/top1 >= production-0.1", "toy/val/top1>=production - 0.1"):
        assert not check_rule(rule, worse, rows, known, "production")[0], rule
        assert check_rule(rule, worse, rows, {}, "production")[0], (
            "the first promotion has nothing to compare with"
        )
    assert check_rule("toy/val/top1 >= production-90", worse, rows, known, "production")[0]
    with pytest.raises(ConfigError, match="did you mean 'production'"):
        check_rule("toy/val/top1 >= prodution - 0.1", better, rows, known, "production")


def test_an_append_whose_answer_was_lost_adds_nothing_twice(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deltalake

    real, lost = deltalake.write_deltalake, []

    def write(uri: str, *arguments: object, **options: object) -> None:
        real(uri, *arguments, **options)
        if not lost:
            lost.append(uri)
            raise OSError("connection reset")

    monkeypatch.setattr(deltalake, "write_deltalake", write)
    sync(root)
    assert lost
    ids = read(root, "results")["id"].to_pylist()
    assert sorted(ids) == sorted(Registry(root).ids("results"))


def test_best_by_the_metric_itself_and_by_init(root: str) -> None:
    done = CliRunner().invoke(app, ["results", "best", "--root", root, "--by", "metric", "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout.splitlines()[-1])["best"]) == 1
    done = CliRunner().invoke(app, ["results", "best", "--root", root, "--by", "init", "--json"])
    best = {row["init"]: row["value"] for row in json.loads(done.stdout.splitlines()[-1])["best"]}
    rows = Registry(root).results(metric="top1")
    assert best == {init: max(r.value for r in rows if r.init == init) for init in ("pretrained", "scratch")}


def test_rollback_goes_back_step_by_step_and_keeps_history(root: str) -> None:
    registry = Registry(root)
    aliases, a, b = Aliases(registry), find(registry, "finetune/a/v1"), find(registry, "finetune/b/v1")
    for row_ in (a, b, a):
        aliases.promote(row_, "production")
    assert aliases.rollback("production").current.step == b.step
    assert aliases.rollback("production").current.step == a.step
    with pytest.raises(ConfigError, match="nothing to go back to"):
        aliases.rollback("production")
    assert len(aliases.get("production").moves) == 5  # type: ignore[union-attr]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.sampled_from(["finetune/a/v1", "finetune/b/v1", "back"]), max_size=12))
def test_every_rollback_names_the_promotion_that_it_undid(root: str, moves: list[str]) -> None:
    registry, name = Registry(root), f"alias-{uuid.uuid4().hex[:12]}"
    aliases, rows = Aliases(registry), {r.step: r for r in registry.checkpoints()}
    standing: list[tuple[str, str]] = []  # ids and steps of promotions that were not undone
    moved = 0
    for move in moves:
        if move != "back":
            now = aliases.promote(rows[move], name).current
            assert now.rolled_back_from is None
            standing.append((now.id, move))
        elif len(standing) < 2:
            with pytest.raises(ConfigError):
                aliases.rollback(name)
            continue
        else:
            undone, _ = standing.pop()
            now = aliases.rollback(name).current
            assert now.rolled_back_from == undone
        moved += 1
        assert now.step == standing[-1][1]
    alias = aliases.get(name)
    assert (len(alias.moves) if alias else 0) == moved
    assert [m.id for m in alias.stack] == [id_ for id_, _ in standing] if alias else not standing
    undone_ids = [m.rolled_back_from for m in alias.moves if m.rolled_back_from] if alias else []
    assert len(set(undone_ids)) == len(undone_ids), "nothing is undone twice"


def test_history_tells_what_each_rollback_undid(root: str) -> None:
    aliases, registry = Aliases(Registry(root)), Registry(root)
    a, b = find(registry, "finetune/a/v1"), find(registry, "finetune/b/v1")
    for row_ in (a, b, a):
        aliases.promote(row_, "production")
    aliases.rollback("production")
    aliases.rollback("production")
    shown = (
        CliRunner().invoke(app, ["checkpoints", "history", "production", "--root", root]).stdout.splitlines()
    )
    assert [line.rpartition("  ")[2] for line in shown[3:]] == [
        "(roll-back of finetune/a/v1)",
        "(roll-back of finetune/b/v1)",
    ]


def test_show_tells_size_metrics_and_config_of_every_step(root: str) -> None:
    shown = CliRunner().invoke(app, ["checkpoints", "show", "finetune/a/v1", "--root", root]).stdout
    assert re.search(r"weights  3 B  sha256", shown), shown
    assert "config: " in shown and "value=3.0" in shown and "init=pretrained" in shown
    origin = itpn("checkpoints", "show", "finetune/a/v1", "--root", root)["lineage"]
    for name in origin["metrics"]:
        assert f"{name} " in shown
    result = next(iter(Registry(root).results(metric="top1", init="pretrained")))
    shown = CliRunner().invoke(app, ["results", "show", result.id, "--root", root]).stdout
    assert "metrics: top1 3.00 %" in shown and shown.index("evaluate/a/v1") < shown.index("finetune/a/v1")


def test_alias_never_points_at_missing_weights(root: str) -> None:
    registry = Registry(root)
    gone = find(registry, "finetune/a/v1")
    storage.delete(gone.checkpoint.uri)
    with pytest.raises(NotFound):
        Aliases(registry).promote(gone, "production")


def test_view_has_each_event_once_and_is_rebuilt_to_the_same(root: str) -> None:
    from pipeline.registry import delta

    with pytest.raises(PreflightError, match="no view"):
        delta.read(root, "results")
    assert delta.sync(root)["results"] == 4
    assert delta.sync(root)["results"] == 0
    Registry(root).append([("results", row(n)) for n in range(3)])
    assert delta.sync(root)["results"] == 3
    before = select(delta.read(root, "results"))
    delta.sync(root, rebuild=True)
    assert select(delta.read(root, "results")) == before == select(Registry(root).results().to_arrow())
    assert len(itpn("results", "list", "--root", root, "--view")["results"]) == 7


def test_view_with_the_columns_of_another_version_is_written_anew(root: str) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    from pipeline.registry import delta

    uri = delta.table_uri(root, "results")
    write_deltalake(uri, pa.table({"id": ["old"], "metric": ["top1"]}), name="results")
    with pytest.raises(PreflightError, match="another version"):
        delta.read(root, "results")
    assert delta.sync(root)["results"] == 4
    assert "old" not in DeltaTable(uri).to_pyarrow_table()["id"].to_pylist()
    assert select(delta.read(root, "results")) == select(Registry(root).results().to_arrow())
    assert delta.sync(root)["results"] == 0


def test_list_has_every_event_however_old_the_view_is(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.registry import delta

    def listed() -> list[str]:
        return sorted(r["id"] for r in itpn("results", "list", "--root", root)["results"])

    registry = Registry(root)
    assert listed() == sorted(registry.ids("results"))
    delta.sync(root)
    registry.append([("results", row(n)) for n in range(3)])
    read: list[str] = []
    real = Registry.read
    monkeypatch.setattr(
        Registry, "read", lambda self, folder, uris: read.extend(uris) or real(self, folder, uris)
    )
    assert listed() == sorted(registry.ids("results")) and len(read) == 3, "only what the view lacks is read"
    monkeypatch.undo()
    assert len(itpn("results", "list", "--root", root, "--view")["results"]) == 4
    gone = next(iter(registry.ids("results").values()))
    storage.delete(gone)
    assert listed() == sorted(registry.ids("results")), "the events are the truth"


def test_root_with_brackets_is_listed_and_has_no_view(tmp_path: Path) -> None:
    from pipeline.registry import delta

    root = str(tmp_path / "a [b] é")
    Registry(root).append([("results", row(1))])
    with pytest.raises(PreflightError, match="brackets"):
        delta.sync(root)
    assert len(itpn("results", "list", "--root", root)["results"]) == 1


def test_programs_of_the_documentation_run_as_they_stand(root: str, tmp_path: Path) -> None:
    """Each in a process of its own, to the letter: its root is called R, so a folder of this name is."""
    sync(root)
    (tmp_path / "R").symlink_to(root)
    repository = Path(__file__).resolve().parents[2]
    text = (repository / "docs" / "registry.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(programs) == 2
    shown = ""
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(repository)},
            text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    assert "[2 rows x" in shown, "the data frame"
    assert re.search(r"pretrained\s*│\s*3.0.*scratch\s*│\s*1.0", shown, flags=re.DOTALL), shown


@pytest.mark.slow
def test_view_on_s3(seaweedfs_root: str) -> None:
    from pipeline.registry import delta

    Registry(seaweedfs_root).append([("results", row(n)) for n in range(5)])
    assert delta.sync(seaweedfs_root)["results"] == 5
    assert delta.read(seaweedfs_root, "results").num_rows == 5
