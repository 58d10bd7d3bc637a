"""The report: what it shows of a root, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import storage
from cluster.errors import ConfigError, NotFound
from cluster.lease import Lease
from pipeline import written
from pipeline.cli import app
from pipeline.registry import Registry, ResultRow, metrics
from pipeline.registry.deletions import Deletions
from pipeline.registry.lineage import find
from pipeline.report import build, charts, graph, tables
from pipeline.report.read import Reader, metric_lines
from pipeline.report.site import ROWS, Site, slug
from pipeline.runner import Runner
from pipeline.step import Step
from tests.pipeline import reported, toys


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return reported.make(str(tmp_path_factory.mktemp("reported") / "root"))


def row(metric: str, value: float, sha256: str = "a" * 64, **other: Any) -> ResultRow:
    facts: dict[str, Any] = {
        "run": "r", "step": "evaluate/a/v1", "code_version": "c", "created_at": "2026-01-01T00:00:00",
        "dataset": "toys", "split": "val", "samples": 10, "init": "scratch", "seed": 0, "evaluator": {},
        "checkpoint": "x", "pretrain": None,
        "training_fingerprint": None, "data_fingerprint": "d",
    }  # fmt: skip
    return ResultRow(**facts | other, metric=metric, value=value, checkpoint_sha256=sha256)


def speed(metric: str, value: float, sha256: str = "a" * 64, **other: Any) -> ResultRow:
    return row(metric, value, sha256, dataset="any", split="any", **other)


def test_every_step_has_a_page_and_its_state(root: str, tmp_path: Path) -> None:
    snapshot = Reader(root).snapshot()
    states = {step: info.state for step, info in snapshot.steps.items()}
    assert states == {
        "shard/toys/v1": "finished",
        "pretrain/base/v1": "finished",
        "finetune/a/v1": "finished",
        f"finetune/{reported.EVIL_NAME}/v1": "finished",
        "evaluate/a/v1": "finished",
        f"evaluate/{reported.EVIL_NAME}/v1": "finished",
        "finetune/broken/v1": "failed",
        "evaluate/broken/v1": "skipped",
        "finetune/cut/v1": "interrupted",
        reported.EVIL: "skipped",
    }
    index = build(root, tmp_path / "report")
    assert len(list((index.parent / "steps").glob("*.html"))) == len(states)
    broken = (index.parent / "steps" / "finetune--broken--v1.html").read_text()
    assert "mend them" in broken and "failed" in broken


def test_a_step_that_runs_is_told_from_one_that_was_cut_off(tmp_path: Path) -> None:
    root = reported.make(str(tmp_path / "root"))
    with Lease.acquire(storage.join(root, "finetune/cut/v1/lease")):
        assert Reader(root).snapshot().steps["finetune/cut/v1"].state == "running"
    assert Reader(root).snapshot().steps["finetune/cut/v1"].state == "interrupted"


def test_no_value_is_markup_and_nothing_is_fetched(root: str, tmp_path: Path) -> None:
    folder = build(root, tmp_path / "report").parent
    pages = list(folder.rglob("*.html"))
    assert len(pages) == 15
    for page in pages:
        text = page.read_text()
        for evil in ("<script>document", "<img src=x", "<b onclick"):
            assert evil not in text, page
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text), page
        for link in re.findall(r'(?:href|src)="([^"#]+)"', text):
            assert link.startswith("data:") or (page.parent / link).is_file(), f"{page}: {link}"


def test_curves_events_and_pictures_are_on_the_page_of_a_training(root: str) -> None:
    site = Site(Reader(root).snapshot())
    page = (site.read("steps/finetune--a--v1.html") or b"").decode()
    for needed in (
        "Learning rate", "Throughput", "Gradient norm", "rolled back", "step not applied", "2026-",
        'src="finetune--a--v1/000000040.png"', "production",
    ):  # fmt: skip
        assert needed in page
    assert (site.read("steps/finetune--a--v1/000000010.png") or b"").startswith(b"\x89PNG")


def test_an_unfinished_training_shows_its_curves_up_to_its_checkpoint(root: str) -> None:
    snapshot = Reader(root).snapshot()
    lines = metric_lines(snapshot, snapshot.steps["finetune/cut/v1"])
    assert [line["step"] for line in lines if "event" not in line] == list(range(1, reported.STEPS + 1))
    page = (Site(snapshot).read("steps/finetune--cut--v1.html") or b"").decode()
    assert "40 of 80 steps" in page and "shard--toys--v1.html" in page


def test_curves_have_one_trace_per_head_and_gaps_where_values_are_not_finite() -> None:
    lines = [
        {"step": 1, "epoch": 0, "loss": 1.0, "loss_pyramid": 0.5, "applied": True},
        {"step": 2, "epoch": 0, "loss": "nan", "loss_pyramid": 0.25, "applied": False},
        {"event": "step not applied", "step": 2, "reason": "loss not finite"},
        {"step": 3, "epoch": 0, "loss": 0.5, "loss_pyramid": 0.25, "mine": 3, "applied": True},
    ]
    loss, mine = charts.curves(lines)
    assert loss["traces"] == [
        {"name": "total", "x": [1, 2, 3], "y": [1.0, None, 0.5]},
        {"name": "pyramid", "x": [1, 2, 3], "y": [0.5, 0.25, 0.25]},
    ]
    assert loss["events"] == [{"name": "step not applied", "x": [2], "text": ["reason: loss not finite"]}]
    assert mine["title"] == "mine" and mine["traces"][0]["y"] == [3.0]


def test_long_curves_are_thinned_out_and_keep_their_end() -> None:
    (chart,) = charts.curves([{"step": step, "loss": 1.0} for step in range(1, 10_001)])
    assert len(chart["traces"][0]["x"]) <= charts.POINTS + 1
    assert chart["traces"][0]["x"][-1] == 10_000 and "every 5th" in chart["note"]


def test_speed_is_drawn_against_the_accuracy_of_the_same_model() -> None:
    migrated = {"migration": {"keep": 0.5}, "gathering": None}
    plain = {"kind": "classification", "view": {"size": 96}, "precision": "fp32"}
    fast = {"kind": "speed", "image_size": 96, "acceleration": {"migration": None}, "precision": "fp32"}
    rows = [
        row("top1", 82.0, evaluator=plain | {"restrict": False}, variant="all classes"),
        row("top1", 80.0, evaluator=plain), row("top1", 75.0, "b" * 64, evaluator=plain),
        row("top1", 70.0, evaluator=plain | {"acceleration": migrated}, variant="migration"),
        speed("images_per_s", 100.0, evaluator=fast | {"batch_size": 1}, variant="off 96px b1"),
        speed("images_per_s", 900.0, evaluator=fast | {"batch_size": 64}, variant="off 96px b64"),
        speed("images_per_s", 1900.0, evaluator=fast | {"acceleration": migrated}, variant="migration 96px b64"),
        speed("images_per_s", 2900.0, evaluator=fast | {"image_size": 64}, variant="off 64px b64"),
        speed("images_per_s", 5.0, "c" * 64, evaluator=fast),  # the accuracy of these two is not known
    ]  # fmt: skip
    (chart,) = charts.accuracy_speed(rows, lambda row: None)
    points = {t["name"]: list(zip(t["x"], t["y"], strict=True)) for t in chart["traces"]}
    assert points == {
        "off b1": [(100.0, 80.0)],
        "off b64": [(900.0, 80.0)],
        "migration b64": [(1900.0, 70.0)],
    }
    assert charts.accuracy_speed([row("top1", 80.0)], lambda row: None) == []


def test_leaderboard_puts_the_best_first_and_joins_speed_to_every_data_set() -> None:
    rows = [
        row("top1", 70.0), row("top1", 80.0, "b" * 64), row("top1", 60.0, dataset="other"), row("top5", 90.0),
        speed("images_per_s", 100.0, evaluator={"batch": 1}), speed("images_per_s", 90.0, evaluator={"batch": 2}),
        speed("images_per_s", 7.0, "c" * 64),
    ]  # fmt: skip
    columns, lines = tables.leaderboard(rows, {"b" * 64: "finetune/b/v1"})
    assert columns == ["top1", "top5", "images_per_s"]
    found = [(line.step, line.data, {n: r.value for n, r in line.values.items()}) for line in lines]
    assert found == [
        ("evaluate/a/v1", "other/val", {"top1": 60.0, "images_per_s": 100.0}),
        ("finetune/b/v1", "toys/val", {"top1": 80.0}),
        ("evaluate/a/v1", "toys/val", {"top1": 70.0, "top5": 90.0, "images_per_s": 100.0}),
        ("evaluate/a/v1", "any", {"images_per_s": 7.0}),
    ]


def test_leaderboard_keeps_different_data_of_one_name_apart(tmp_path: Path) -> None:
    rows = [
        row("top1", 70.0, evaluated_fingerprint="1" * 64), row("top1", 90.0, "b" * 64, evaluated_fingerprint="2" * 64),
        row("top1", 60.0, evaluated_fingerprint="2" * 64),
    ]  # fmt: skip
    _, lines = tables.leaderboard(rows, {})
    found = [(line.data, line.values["top1"].value) for line in lines]
    assert found == [
        ("toys/val (11111111)", 70.0),
        ("toys/val (22222222)", 90.0),
        ("toys/val (22222222)", 60.0),
    ]
    root = str(tmp_path / "root")
    Registry(root).append([("results", r) for r in rows])
    page = build(root, tmp_path / "report").read_text()
    assert "There are different data called toys/val" in page
    first = page[page.index("<tbody>") :].split("</tr>")[0]
    assert first.index("toys/val (11111111)") < first.index(">70.00<"), "the data stand before the values"


def test_leaderboard_of_an_unknown_metric_is_in_order_of_time_and_says_so(tmp_path: Path) -> None:
    rows = [row("mine", value, f"{n:064x}", created_at=f"202{n}") for n, value in enumerate((2.0, 9.0, 1.0))]
    assert [line.values["mine"].value for line in tables.leaderboard(rows, {})[1]] == [2.0, 9.0, 1.0]
    Registry(str(tmp_path / "root")).append([("results", r) for r in rows])
    page = build(str(tmp_path / "root"), tmp_path / "report").read_text()
    assert "Nobody has declared whether higher or lower values of mine are better" in page


@pytest.mark.parametrize("count", [1200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_results_make_a_short_page_and_a_whole_csv(count: int, tmp_path: Path) -> None:
    root = reported.many(str(tmp_path / "root"), count)
    index = build(root, tmp_path / "report")
    text = index.read_text()
    assert text.count("<tr>") == ROWS + 1 and f"{count:,}" in text and 'href="results.csv"' in text
    assert text.index(f">{(count - 1) / 100:.2f}<") < text.index(f">{(count - 2) / 100:.2f}<")
    with open(index.parent / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == count


def test_many_results_are_read_from_the_view_and_new_ones_from_their_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.registry import delta

    root = reported.many(str(tmp_path / "root"), 1200)
    plain = Reader(root).snapshot()
    delta.sync(root)
    Registry(root).append([("results", row("top1", 1.0, step="evaluate/late/v1"))])
    asked: list[str] = []
    real = storage.read_json
    monkeypatch.setattr(storage, "read_json", lambda uri: asked.append(uri) or real(uri))
    reader = Reader(root)
    results = reader.snapshot().results
    assert [r for r in results if r.step != "evaluate/late/v1"] == plain.results and len(results) == 1201
    assert len(asked) < 10
    asked.clear()
    assert reader.snapshot().results == results and len(asked) < 10


def test_a_new_report_replaces_the_old_one_and_nothing_else(root: str, tmp_path: Path) -> None:
    out = tmp_path / "report"
    build(root, out)
    small = str(tmp_path / "small")
    Registry(small).append([("results", row("top1", 1.0))])
    build(small, out)
    assert not list(out.rglob("*.png")) and not list((out / "steps").glob("*.html"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="no folder of a report"):
        build(root, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_a_list_of_files_that_was_tampered_with_reaches_nothing_outside(root: str, tmp_path: Path) -> None:
    out = build(root, tmp_path / "report").parent
    (tmp_path / "precious").write_text("x")
    (out / ".itpn-report.json").write_text(json.dumps(["../precious", str(tmp_path / "precious")]))
    build(root, out)
    assert (tmp_path / "precious").exists()


def test_an_empty_root_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing was run under"):
        build(str(tmp_path / "typo"), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_report_reads_an_object_store(root: str, moto_root: str, tmp_path: Path) -> None:
    storage.upload_tree(root, moto_root)
    snapshot = Reader(moto_root).snapshot()
    assert {info.state for info in snapshot.steps.values()} >= {"finished", "failed", "interrupted"}
    assert b"rolled back" in (Site(snapshot).read("steps/finetune--a--v1.html") or b"")


def test_a_checkpoint_whose_files_were_deleted_is_marked(tmp_path: Path) -> None:
    registry = Registry(reported.make(str(tmp_path / "root")))
    row = find(registry, "pretrain/base/v1")
    deletions = Deletions(registry)
    mark = deletions.mark(row.run, row.step, row.checkpoint, "older than <b>any</b>")
    assert mark and deletions.commit(mark)
    site = Site(Reader(registry.root).snapshot())
    for path in ("checkpoints.html", "steps/pretrain--base--v1.html"):
        page = (site.read(path) or b"").decode()
        assert "older than &lt;b&gt;any" in page and page.count("older than") == 1


def test_weights_that_were_taken_in_are_joined_to_the_step_that_made_them(tmp_path: Path) -> None:
    root = reported.make(str(tmp_path / "root"))
    uri = find(Registry(root), "finetune/a/v1").checkpoint.uri
    step = Step(kind="import", name="given", fn=reported.train, config=reported.TakenConfig(uri=uri))
    Runner(root, "evaluate", [step], open_session=toys.ThreadSession).run()
    assert Reader(root).snapshot().steps["import/given/v1"].inputs == {"weights": "finetune/a/v1"}


def test_command_writes_the_report_and_names_its_index(root: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", "--root", root, "--out", str(tmp_path / "report"), "--json"])
    assert result.exit_code == 0, result.output
    index = json.loads(result.stdout.splitlines()[-1])["index"]
    assert Path(index) == tmp_path / "report" / "index.html" and Path(index).is_file()


def test_command_serves_until_it_is_interrupted(root: str) -> None:
    command = [sys.executable, "-m", "pipeline", "serve", "--root", root, "--port", "0", "--json"]
    # A shell starts background jobs with Ctrl+C ignored, and their children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with server:
        assert server.stdout
        url = json.loads(server.stdout.readline())["url"]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url) as answer:
            assert b"Leaderboard" in answer.read()
        taken = CliRunner().invoke(app, ["serve", "--root", root, "--port", url.split(":")[-1].strip("/")])
        assert taken.exit_code == 2 and "cannot be used" in taken.output
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0


def test_lineage_runs_from_left_to_right_and_no_box_covers_another(root: str) -> None:
    steps = Reader(root).snapshot().steps
    drawn = graph.draw(graph.made_from({step: info.inputs.values() for step, info in steps.items()}))
    columns = [
        drawn.boxes[f"{kind}/v1"][0] for kind in ("shard/toys", "pretrain/base", "finetune/a", "evaluate/a")
    ]
    assert columns == sorted(set(columns))
    boxes = list(drawn.boxes.values())
    for index, (x, y) in enumerate(boxes):
        assert 0 <= x <= drawn.width - graph.BOX_W and 0 <= y <= drawn.height - graph.BOX_H
        assert all(x != x2 or abs(y - y2) >= graph.BOX_H for x2, y2 in boxes[:index])


def test_a_circle_of_inputs_is_drawn_all_the_same() -> None:
    drawn = graph.draw(graph.made_from({"a/a": ["b/b"], "b/b": ["a/a", "b/b"], "c/c": ["b/b"]}))
    assert set(drawn.boxes) == {"a/a", "b/b", "c/c"}


def test_names_of_pages_do_not_clash() -> None:
    names = [
        slug(s)
        for s in ("a/b--c/v1", "a--b/c/v1", "a/b/c/v1", "../../x", ".", "a/b/v1", "A" * 300, "a/<b>/v1")
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,130}", name) and not name.startswith(".") for name in names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (metrics.measure(78.123, "top1"), "78.12"), (metrics.measure(17.6e9, "flops"), "17.60"),
        (written.plain(0.0), "0"),
        (written.plain(12480.4), "12,480"), (written.plain(2.13e-6), "2.13e-06"), (written.plain(float("nan")), "nan"),
        (written.size(999), "999 B"), (written.size(999_999), "1.0 MB"), (written.size(5_518_040), "5.5 MB"),
        (written.duration(0.44), "0.4 s"), (written.duration(59.7), "1 min"), (written.duration(12000), "3 h 20 min"),
        (written.duration(None), ""), (written.moment("2026-11-22T16:40:22.109+00:00"), "2026-11-22 16:40"),
    ],
)  # fmt: skip
def test_values_are_written_with_units(text: str, expected: str) -> None:
    assert text == expected
