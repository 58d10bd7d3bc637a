"""What may be ranked: values of the same data, of metrics whose direction is known; from the view as without it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import storage
from cluster.errors import ConfigError
from pipeline import view
from pipeline.cli import app
from pipeline.commands.table import gather
from pipeline.registry import Registry, ResultRow
from pipeline.registry.aliases import Aliases, RuleRefused
from pipeline.registry.compare import compare
from pipeline.registry.delta import read, sync, table_uri
from pipeline.registry.lineage import find
from pipeline.registry.metrics import METRICS, direction
from pipeline.registry.retention import KeepRule, Retention, judge
from pipeline.runner import Runner
from tests.pipeline import toys

OLD, NEW = "1" * 64, "2" * 64  # fingerprints of two data sets of one name


def row(number: int, value: float, data: str | None = OLD, metric: str = "top1", **other: Any) -> ResultRow:
    facts: dict[str, Any] = {
        "run": "r", "step": f"evaluate/n{number}/v1", "code_version": "c",
        "created_at": f"2026-01-01T00:00:{number:02}",
        "dataset": "d", "split": "val", "samples": 1, "init": "scratch", "seed": number, "evaluator": {"b": [1]},
        "checkpoint": "c", "checkpoint_sha256": f"{number:064x}", "pretrain": None,
        "training_fingerprint": None, "data_fingerprint": "f", "evaluated_fingerprint": data,
    }  # fmt: skip
    return ResultRow(**facts | other, metric=metric, value=value)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two data sets of one name, another of another name, and a metric of our own."""
    found = Registry(str(tmp_path / "root"))
    rows = [
        row(1, 70.0),
        row(2, 60.0, init="pretrained"),
        row(3, 99.0, NEW),
        row(4, 98.0, NEW, init="pretrained"),
    ]
    rows += [row(5, 10.0, "3" * 64, dataset="e"), row(6, 1.0, metric="mine"), row(7, 2.0, metric="mine")]
    found.append([("results", r) for r in rows])
    return found


@pytest.fixture
def trained(tmp_path: Path) -> Registry:
    """Checkpoints of two toy chains, the second better and judged on other data of the same name."""
    root = str(tmp_path / "root")
    Runner(root, "toy", toys.chain(), open_session=toys.ThreadSession).run()
    return Registry(root)


def itpn(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return done.exit_code, json.loads(done.stdout.strip().splitlines()[-1])


def test_best_refuses_different_data_and_takes_each_by_itself(registry: Registry) -> None:
    code, answer = itpn("results", "best", "--root", registry.root, "--dataset", "d")
    assert code == 2
    for told in ("different data", "d/val (11111111), d/val (22222222)", "--evaluated", "--by"):
        assert told in answer["error"]
    with pytest.raises(ConfigError, match="e/val"):
        registry.best("top1")
    assert registry.best("top1", dataset="e").value == 10.0
    code, answer = itpn("results", "best", "--root", registry.root, "--evaluated", "2222")
    assert (code, answer["best"]["value"]) == (0, 99.0)
    code, answer = itpn("results", "best", "--root", registry.root, "--evaluated", "4")
    assert code == 2 and OLD in answer["error"]


def test_what_best_does_not_find_is_named(registry: Registry) -> None:
    for arguments, told in (
        (("--dataset", "dd"), "did you mean 'd'"), (("--metric", "topp1"), "did you mean 'top1'"),
        (("--dataset", "e", "--split", "train"), "valid names: val"), (("--by", "inti"), "did you mean 'init'"),
    ):  # fmt: skip
        code, answer = itpn("results", "best", "--root", registry.root, *arguments)
        assert code == 2 and told in answer["error"], answer


def test_best_of_each_value_is_best_on_each_data(registry: Registry) -> None:
    _, answer = itpn("results", "best", "--root", registry.root, "--dataset", "d", "--by", "init")
    found = {(r["init"], r["evaluated_fingerprint"]): r["value"] for r in answer["best"]}
    assert found == {
        ("scratch", OLD): 70.0, ("pretrained", OLD): 60.0, ("scratch", NEW): 99.0, ("pretrained", NEW): 98.0,
    }  # fmt: skip
    by_data = registry.best_of_each("top1", "evaluated_fingerprint")
    assert [r.value for r in by_data] == [70.0, 99.0, 10.0]
    shown = CliRunner().invoke(app, ["results", "best", "--root", registry.root, "--by", "init"]).stdout
    assert "d/val (11111111)" in shown and "e/val" in shown


def test_compare_gives_different_data_lines_of_their_own(registry: Registry) -> None:
    names = ["seed=1", "seed=3"]
    found = compare(registry, names)
    assert found["evaluated_differ"] == ["d/val"]
    assert [line["data"] for line in found["metrics"]] == ["d/val (11111111)", "d/val (22222222)"]
    assert all(line["groups"][1]["delta"] is None for line in found["metrics"])
    shown = CliRunner().invoke(app, ["results", "compare", *names, "--root", registry.root]).stdout
    assert "evaluated data differ" in shown
    with pytest.raises(ConfigError, match=r"no result has init=scrach(.|\n)*did you mean 'scratch'"):
        compare(registry, ["seed=1", "init=scrach,dataset=d"])
    same = compare(registry, ["seed=1", "seed=2"])
    assert same["evaluated_differ"] == [] and same["metrics"][0]["data"] == "d/val"
    assert same["metrics"][0]["groups"][1]["delta"] == -10.0


def test_rule_does_not_compare_with_an_alias_on_other_data(trained: Registry) -> None:
    aliases, rule = Aliases(trained), "toy/val/top1 >= production"
    a, b = find(trained, "finetune/a/v1"), find(trained, "finetune/b/v1")
    [judged] = trained.results(metric="top1", init="pretrained")
    content = judged.model_dump() | {"checkpoint_sha256": "9" * 64, "evaluated_fingerprint": NEW}
    aliases.promote(b, "production")
    for uri in [u for u in trained.ids("results").values() if storage.read_json(u)["init"] == "pretrained"]:
        storage.delete(uri)
    fresh = {"checkpoint_sha256": a.checkpoint.sha256, "value": 50.0}
    trained.append([("results", ResultRow(**content | fresh))])
    with pytest.raises(RuleRefused, match=r"data differ(.|\n)*22222222(.|\n)*same data") as refused:
        aliases.promote(a, "production", rule)
    assert refused.value.exit_code == 2
    # Judged on the data of production too: now there is a pair, and the newer value on other data is left out.
    old = {"evaluated_fingerprint": "e" * 64, "value": 0.5, "created_at": "2025"}
    trained.append([("results", ResultRow(**content | fresh | old))])
    with pytest.raises(RuleRefused, match=r"top1 0\.5 against 1"):
        aliases.promote(a, "production", rule)


def test_rule_asks_for_better_values_not_for_worse(trained: Registry) -> None:
    aliases, b = Aliases(trained), find(trained, "finetune/b/v1")
    aliases.promote(b, "production")
    with pytest.raises(ConfigError, match=r"only worse ones pass(.|\n)*'<='(.|\n)*lower values of loss"):
        aliases.promote(b, "production", "toy/val/loss >= production")
    with pytest.raises(ConfigError, match="'>='"):
        aliases.promote(b, "production", "toy/val/top1 <= production + 1")
    aliases.promote(b, "production", "toy/val/loss >= -7")  # a bound against a number may be on either side
    assert (
        aliases.promote(b, "production", "toy/val/loss <= production").current.verdict == "loss -1 against -1"
    )


def test_an_unknown_metric_is_told_its_direction(registry: Registry) -> None:
    code, answer = itpn("results", "best", "--root", registry.root, "--metric", "mine")
    assert code == 2
    for told in ("'mine'", "top1", "latency_p50_ms", "--lower-is-better"):
        assert told in answer["error"]
    for flag, value in (("--lower-is-better", 1.0), ("--higher-is-better", 2.0)):
        code, answer = itpn("results", "best", "--root", registry.root, "--metric", "mine", flag)
        assert (code, answer["best"]["value"]) == (0, value)
    code, answer = itpn("results", "best", "--root", registry.root, "--dataset", "e", "--lower-is-better")
    assert code == 2 and "higher is better" in answer["error"]
    assert compare(registry, ["seed=6", "seed=7"])["metrics"][0]["groups"][1]["better"] is None
    with pytest.raises(ValueError, match="lower_is_better"):
        KeepRule(task="classify", best=1, metric="d/val/mine")
    assert KeepRule(task="classify", best=1, metric="d/val/mine", lower_is_better=True)


def test_every_metric_of_speed_and_accuracy_has_a_direction() -> None:
    down = {"loss", "train_loss", "ece", "latency_p50_ms", "latency_p99_ms", "flops", "peak_memory_bytes"}
    down |= {"memory_bytes", "train_seconds"}
    assert {name for name in METRICS if direction(name)} == down


def test_show_tells_unit_and_direction(registry: Registry) -> None:
    ids = {r.metric: r.id for r in registry.results(seed=1) + registry.results(seed=6)}
    known = CliRunner().invoke(app, ["results", "show", ids["top1"], "--root", registry.root]).stdout
    assert re.search(r"value +70\.0 %  \(higher is better\)", known)
    unknown = CliRunner().invoke(app, ["results", "show", ids["mine"], "--root", registry.root]).stdout
    assert "nobody knows which way is better" in unknown


def test_retention_keeps_the_best_on_each_data(trained: Registry) -> None:
    records = [s.record for s in Runner(trained.root, "toy", toys.chain()).plan() if s.record]
    a, b = (find(trained, f"finetune/{name}/v1").checkpoint.sha256 for name in "ab")
    policy = Retention(rules=(KeepRule(task="classify", best=1, metric="d/val/top1"),))
    kept = {
        data: {step.split("/")[1] for step, (keeps, _) in judge(policy, records, rows, 0.0).items() if keeps}
        for data, rows in (
            ("same", [row(1, 1.0, checkpoint_sha256=a), row(2, 2.0, checkpoint_sha256=b)]),
            ("different", [row(1, 1.0, checkpoint_sha256=a), row(2, 2.0, NEW, checkpoint_sha256=b)]),
        )
    }
    assert kept == {"same": {"b"}, "different": {"a", "b"}}


def test_tables_of_a_recipe_keep_different_data_apart(trained: Registry) -> None:
    statuses = Runner(trained.root, "toy", toys.chain()).plan()
    steps = [s.step for s in statuses if s.step.kind == "evaluate"]
    groups, _ = gather(trained.root, steps, "top1")
    assert list(groups) == [()], "the same data need no column"
    uri = storage.join(trained.root, "evaluate/a/v1/record.json")
    record = storage.read_json(uri)
    record["artifact"]["data_fingerprint"] = NEW
    storage.overwrite(uri, storage.canonical_json(record))
    groups, _ = gather(trained.root, steps, "top1")
    assert list(groups) == [(("data", "toy/val (22222222)"),), (("data", "toy/val (eeeeeeee)"),)]
    rows = [row(1, 70.0), row(1, 90.0, NEW, init="pretrained")]
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(view.results_table(rows))
    assert "d/val (11111111)" in shown.get() and "+20" not in shown.get()


def test_answers_are_the_same_with_a_view_without_one_and_with_an_old_one(registry: Registry) -> None:
    def answers() -> list[Any]:
        id_ = registry.results(seed=3)[0].id
        asked = [
            ("best", "--dataset", "e"), ("best", "--dataset", "d", "--by", "init"), ("show", id_[:8]),
            ("compare", "init=scratch,dataset=d,metric=top1", "init=pretrained"), ("list", "--metric", "top1"),
        ]  # fmt: skip
        return [itpn("results", *words, "--root", registry.root) for words in asked]

    without, rows = answers(), registry.results()
    assert all(code == 0 for code, _ in without)
    sync(registry.root)
    assert answers() == without and registry.results() == rows
    registry.append([("results", row(8, 11.0, "3" * 64, dataset="e"))])
    assert registry.best("top1", dataset="e").value == 11.0, "newer than the view"
    later = answers()
    for file in storage.list_files(table_uri(registry.root, "results")):
        storage.overwrite(file.uri, b"broken")
    assert answers() == later, "a broken view is not used"
    code, told = itpn("registry", "sync", "--root", registry.root)
    assert code == 5 and "--rebuild" in told["error"]
    assert itpn("registry", "sync", "--rebuild", "--root", registry.root)[1]["added"]["results"] == 8
    assert answers() == later and read(registry.root, "results").num_rows == 8


def test_what_the_view_has_is_not_read_again(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(registry.root)
    registry.append([("results", row(8, 11.0, "3" * 64, dataset="e"))])
    asked: list[str] = []
    real = storage.read_json
    monkeypatch.setattr(storage, "read_json", lambda uri: asked.append(uri) or real(uri))
    assert registry.best("top1", dataset="e").value == 11.0
    compare(registry, ["seed=1", "seed=8"])
    assert len({uri for uri in asked if "/registry/results/" in uri}) == 1
