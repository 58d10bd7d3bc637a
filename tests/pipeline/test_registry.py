"""The registry appends once, reads everything, and finds the best."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from pipeline.registry import Registry
from pipeline.runner import Runner
from tests.pipeline import toys


@pytest.fixture
def root(tmp_path: Path) -> str:
    Runner(str(tmp_path), "toy", toys.chain(), open_session=toys.ThreadSession).run()
    return str(tmp_path)


def test_rows_carry_the_whole_lineage(root: str) -> None:
    rows = Registry(root).results(metric="top1")
    assert [(r.init, r.value, r.pretrain) for r in sorted(rows, key=lambda r: r.init)] == [
        ("pretrained", 3.0, "p"),
        ("scratch", 1.0, None),
    ]
    for row in rows:
        assert storage.exists(row.checkpoint)
        assert row.run == "toy" and row.step.startswith("evaluate/") and row.data_fingerprint == "d" * 64
        assert row.training_fingerprint and row.code_version and row.created_at


def test_publishing_a_record_twice_adds_nothing(root: str) -> None:
    registry = Registry(root)
    records = [s.record for s in Runner(root, "toy", toys.chain()).plan() if s.record]
    assert len(records) == 4
    assert registry.publish(records) == 0
    assert len(registry.results()) == 4
    assert len(registry.checkpoints()) == 2


def test_best_is_highest_accuracy_and_lowest_loss(root: str) -> None:
    assert Registry(root).best("top1").value == 3.0
    assert Registry(root).best("loss").value == -3.0


def test_best_of_an_unknown_metric_names_the_nearest(root: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'top1'"):
        Registry(root).best("top2")


def test_unknown_filter_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'dataset'"):
        Registry(root).results(datset="x")


def test_unreadable_event_is_named(root: str) -> None:
    storage.write_exclusive(f"{root}/registry/results/zz.json", b'{"half": ')
    with pytest.raises(DataInvalid, match=r"results/zz\.json"):
        Registry(root).results()
