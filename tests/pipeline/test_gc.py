"""Retention as people use it: dry run, rules, training state, dead attempts, uploads, and what is said after."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, StorageRefused, StorageUnavailable
from cluster.lease import Lease
from pipeline import recipes
from pipeline.cli import app
from pipeline.commands.gc import policies_of
from pipeline.registry import Registry, garbage
from pipeline.registry.aliases import Aliases
from pipeline.registry.deletions import Deleted, Deletions
from pipeline.registry.inventory import Group
from pipeline.registry.lineage import find
from pipeline.registry.retention import KeepRule, Retention
from pipeline.runner import Runner
from pipeline.status import State
from pipeline.step import Step
from stages.adopt.config import AdoptConfig
from tests.faulty_s3 import faulty_s3
from tests.pipeline import toys
from tests.uploads import begin_upload

ALL = Retention(rules=(KeepRule(task="pretrain", last=0), KeepRule(task="classify", last=0)))
LATER_S = 3 * 86400.0


def run(root: str, steps: list[Step]) -> dict[str, State]:
    statuses = Runner(root, "toy", steps, open_session=toys.ThreadSession).run()
    return {status.step.id: status.state for status in statuses}


def versions(*names: str) -> list[Step]:
    """Pre-training in several versions, each with its own weights."""
    return [
        Step(
            kind="pretrain",
            name="p",
            version=name,
            fn=toys.train_from,
            config=toys.ToyConfig(value=float(i + 1)),
        )
        for i, name in enumerate(names)
    ]


def tuned(parent: Step, name: str) -> Step:
    return Step(
        kind="finetune", name=name, fn=toys.train_from, config=toys.ToyConfig(value=7.0), inputs={"init": parent}
    )  # fmt: skip


def collect(root: str, policy: Retention = ALL, apply: bool = True, later_s: float = 0.0) -> list[Group]:
    work = garbage.collect if apply else garbage.plan
    return work(Registry(root), lambda recipe: policy, time.time() + later_s)


def gone(groups: list[Group], kind: str = "checkpoint") -> set[str]:
    return {group.step for group in groups if group.kind == kind and group.delete}


def itpn(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"code": done.exit_code}


def everything(root: str) -> dict[str, bytes]:
    return {item.uri: storage.read_bytes(item.uri) for item in storage.list_files(root)}


def test_without_rules_everything_finished_stays(any_root: str) -> None:
    run(any_root, toys.chain())
    before = everything(any_root)
    groups = collect(any_root, Retention(), later_s=LATER_S)
    assert not [group for group in groups if group.delete]
    assert everything(any_root) == before


def test_dry_run_touches_nothing_and_lists_bytes_and_reasons(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    for step in versions("v1", "v2"):
        run(root, [step])
    before = everything(root)
    policy = tmp_path / "policy.json"
    policy.write_text('{"*": {"rules": [{"task": "pretrain", "last": 1}]}}')
    found = itpn("checkpoints", "gc", "--root", root, "--policy", str(policy))
    assert everything(root) == before
    assert (found["bytes"], found["objects"], found["applied"]) == (3, 1, False)
    reasons = {g["step"]: (g["delete"], g["why"]) for g in found["groups"] if g["kind"] == "checkpoint"}
    assert reasons["pretrain/p/v1"] == (True, "not among the last 1 of its step")
    assert reasons["pretrain/p/v2"] == (False, "among the last 1 of its step")
    assert itpn("checkpoints", "gc", "--root", root, "--policy", str(policy), "--apply")["objects"] == 1
    assert set(before) - set(everything(root)) == {find(Registry(root), "pretrain/p/v1").checkpoint.uri}


@pytest.mark.parametrize(
    "content", ['{"demo": {"rulez": []}}', '{"dem": {}}', "[]", "{", '{"*": {"rules": [{"task": "pretrain"}]}}']
)  # fmt: skip
def test_policy_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "policy.json").write_text(content)
    with pytest.raises(ConfigError):
        policies_of(tmp_path / "policy.json")


def test_every_recipe_has_a_policy_its_own_or_the_safe_one(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies_of(None)
    for name in [*recipes.names(), "no recipe any more", ""]:
        assert policy(name) == Retention(), "nothing that is finished goes by default"
    monkeypatch.setattr(recipes.load("demo"), "RETENTION", ALL, raising=False)
    assert policy("demo") == ALL


def test_best_and_recent_ones_stay(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(root, toys.chain())  # top1 is 3 of a, 1 of b
    best = Retention(rules=(KeepRule(task="classify", best=1, metric="toy/val/top1"),))
    assert gone(collect(root, best, apply=False)) == {"finetune/b/v1"}
    lowest = Retention(rules=(KeepRule(task="classify", best=1, metric="toy/val/loss"),))
    assert gone(collect(root, lowest, apply=False)) == {"finetune/b/v1"}, "the toy's loss is -top1"
    unjudged = Retention(rules=(KeepRule(task="classify", best=1, metric="toy/val/ece"),))
    assert gone(collect(root, unjudged, apply=False)) == set()
    recent = Retention(rules=(KeepRule(task="classify", newer_than_days=1),))
    assert gone(collect(root, recent, apply=False)) == set()
    assert gone(collect(root, recent, apply=False, later_s=LATER_S)) == {"finetune/a/v1", "finetune/b/v1"}


def test_what_an_alias_and_its_rollback_point_at_stays_with_what_it_was_made_from(any_root: str) -> None:
    v1, v2, v3 = versions("v1", "v2", "v3")
    run(any_root, [tuned(v1, "a"), tuned(v2, "b"), tuned(v3, "c")])
    aliases, registry = Aliases(Registry(any_root)), Registry(any_root)
    for name in ("finetune/c/v1", "finetune/a/v1", "finetune/b/v1"):
        aliases.promote(find(registry, name), "production")
    groups = collect(any_root)
    assert gone(groups) == {"finetune/c/v1", "pretrain/p/v3"}
    reasons = {group.step: group.why for group in groups if group.kind == "checkpoint"}
    assert reasons["finetune/b/v1"] == "'production' points at it"
    assert reasons["finetune/a/v1"] == "'production' would roll back to it"
    assert reasons["pretrain/p/v2"] == "finetune/b/v1 was made from it"
    assert aliases.rollback("production").current.step == "finetune/a/v1"
    with pytest.raises(Deleted):
        aliases.rollback("production")


def test_an_unfinished_step_keeps_what_it_needs(tmp_path: Path) -> None:
    root, (parent,) = str(tmp_path), versions("v1")
    run(root, [parent])
    storage.write_json_exclusive(
        f"{root}/finetune/a/v1/plan.json",
        {"fingerprint": tuned(parent, "a").fingerprint, "identity": tuned(parent, "a").identity},
    )
    groups = collect(root)
    assert gone(groups) == set()
    assert "finetune/a/v1 is unfinished and needs it" in [group.why for group in groups]
    run(root, [tuned(parent, "a")])
    assert gone(collect(root)) == {"finetune/a/v1", "pretrain/p/v1"}


def test_weights_that_a_step_adopts_by_their_path_stay_while_it_is_unfinished(tmp_path: Path) -> None:
    root, (made,) = str(tmp_path), versions("v1")
    run(root, [made])
    row = find(Registry(root), made.id)
    config = AdoptConfig(uri=row.checkpoint.uri, sha256=row.checkpoint.sha256)
    adopted = Step(kind="import", name="a", fn=adopt_nothing, config=config)
    states = Runner(root, "toy", [adopted], open_session=toys.ThreadSession).run()
    assert states[0].state is State.FAILED
    groups = collect(root)
    assert gone(groups) == set() and "import/a/v1 is unfinished and needs it" in [g.why for g in groups]

    deletions = Deletions(Registry(root))
    mark = deletions.mark(row.run, row.step, row.checkpoint, "as if gc had looked before the plan was there")
    Runner(root, "toy", [adopted], open_session=toys.ThreadSession).run()
    assert mark and deletions.commit(mark) is None, "the runner objected"
    storage.delete_tree(f"{root}/import")
    assert gone(collect(root)) == {made.id}
    states = Runner(root, "toy", [adopted], open_session=toys.ThreadSession).run()
    assert isinstance(states[0].error, Deleted)


def adopt_nothing(config: AdoptConfig, inputs: dict, context: object) -> None:
    """Fails, so that its plan stays without a record."""
    raise DataInvalid("stopped before it read anything")


def test_the_registry_tells_what_was_deleted_and_does_not_call_it_damage(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(root, toys.chain())
    uri = find(Registry(root), "finetune/b/v1").checkpoint.uri
    best = Retention(rules=(KeepRule(task="classify", best=1, metric="toy/val/top1"),))
    collect(root, best)
    assert not storage.exists(uri)
    listed = itpn("checkpoints", "list", "--root", root)["checkpoints"]
    assert {c["step"]: bool(c["deleted"]) for c in listed} == {"finetune/a/v1": False, "finetune/b/v1": True}
    shown = itpn("checkpoints", "show", "finetune/b/v1", "--root", root)
    assert "not among the best 1" in shown["deleted"]["why"] and shown["results"]
    verified = itpn("checkpoints", "verify", "--root", root)
    told = {f["step"]: f.get("deleted", False) for f in verified["files"]}
    assert verified["code"] == 0 and told == {"finetune/a/v1": False, "finetune/b/v1": True}
    promoted = itpn("checkpoints", "promote", "finetune/b/v1", "production", "--root", root)
    assert promoted["code"] == 5 and "were deleted" in promoted["error"]
    out = itpn("checkpoints", "export", "finetune/b/v1", "--out", str(tmp_path / "x"), "--root", root)
    assert out["code"] == 5 and "were deleted" in out["error"]
    assert [event.step for event in Registry(root).read("deletions")] == ["finetune/b/v1"]


def test_a_finished_recipe_stays_finished_but_deleted_weights_are_no_input(tmp_path: Path) -> None:
    root, (parent,) = str(tmp_path), versions("v1")
    run(root, [parent])
    collect(root)
    assert run(root, [parent]) == {parent.id: State.DONE}, "its record and results are still there"
    statuses = Runner(root, "toy", [tuned(parent, "a")], open_session=toys.ThreadSession).run()
    assert statuses[-1].state is State.FAILED and isinstance(statuses[-1].error, Deleted)
    assert "--set version" in str(statuses[-1].error)


def test_a_deletion_that_was_cut_short_is_finished_by_the_next(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(root, versions("v1"))
    row, deletions = find(Registry(root), "pretrain/p/v1"), Deletions(Registry(root))
    mark = deletions.mark(row.run, row.step, row.checkpoint, "test")
    assert mark and deletions.commit(mark)
    assert storage.exists(row.checkpoint.uri)
    assert gone(collect(root, Retention())) == {"pretrain/p/v1"}
    assert not storage.exists(row.checkpoint.uri)
    assert len(Registry(root).read("deletions")) == 1
    collect(root, Retention())
    assert len(Registry(root).read("deletions")) == 1


def training(root: str, step: str, *steps: int) -> None:
    """Training checkpoints as stages/train/checkpoint.py leaves them, and fragments that no manifest names."""
    for number in (*steps, 999):
        path = f"checkpoints/files/{number:09d}-x/rank.safetensors"
        storage.write_exclusive(f"{root}/{step}/{path}", b"x" * 100)
        if number != 999:
            manifest = {"step": number, "files": [{"path": path}], "means": {"loss": abs(number - 15)}}
            storage.write_json_exclusive(f"{root}/{step}/checkpoints/{number:09d}.json", manifest)


def left(root: str, step: str) -> list[str]:
    items = storage.list_files(f"{root}/{step}/checkpoints")
    return [item.uri.rpartition("/checkpoints/")[2] for item in items]


def test_training_state_goes_once_the_step_is_finished_and_not_before(any_root: str) -> None:
    (step,) = versions("v1")
    training(any_root, step.id, 2, 4)
    plan = {"fingerprint": step.fingerprint, "identity": step.identity}
    storage.write_json_exclusive(f"{any_root}/{step.id}/plan.json", plan)
    groups = collect(any_root, Retention())
    assert not [group for group in groups if group.delete] and len(left(any_root, step.id)) == 5
    collect(any_root, Retention(), later_s=LATER_S)
    assert left(any_root, step.id) == [
        "000000002.json", "000000004.json",
        "files/000000002-x/rank.safetensors", "files/000000004-x/rank.safetensors",
    ], "what no manifest names is an orphan"  # fmt: skip
    run(any_root, [step])
    collect(any_root, Retention(training_checkpoints=1))
    assert left(any_root, step.id) == ["000000004.json", "files/000000004-x/rank.safetensors"]
    collect(any_root, Retention())
    assert left(any_root, step.id) == []


def test_training_checkpoints_that_the_config_keeps_stay(tmp_path: Path) -> None:
    root, (step,) = str(tmp_path), versions("v1")
    run(root, [step])
    training(root, step.id, 10, 15, 20)
    uri = f"{root}/{step.id}/record.json"
    record = storage.read_json(uri)
    record["config"]["checkpoint"] = {"keep_every_steps": 20, "keep_best": 1, "best_by": "loss"}
    storage.overwrite(uri, storage.canonical_json(record))
    collect(root, Retention())
    assert [name for name in left(root, step.id) if name.endswith(".json")] == [
        "000000015.json",
        "000000020.json",
    ]


def test_files_of_dead_attempts_go_after_the_grace_and_never_under_a_live_lease(tmp_path: Path) -> None:
    root, (done, begun) = str(tmp_path), versions("v1", "v2")
    run(root, [done])
    plan = {"fingerprint": begun.fingerprint, "identity": begun.identity}
    storage.write_json_exclusive(f"{root}/{begun.id}/plan.json", plan)
    dead = [f"{root}/{step.id}/attempts/dead/half" for step in (done, begun)]
    for uri in dead:
        storage.write_exclusive(uri, b"half")
    assert gone(collect(root, Retention(grace_hours=24)), "orphans") == set()
    with Lease.acquire(f"{root}/{begun.id}/lease"):
        groups = collect(root, Retention(grace_hours=24), later_s=LATER_S)
        assert gone(groups, "orphans") == {done.id}
        assert gone(collect(root, Retention(), apply=False, later_s=LATER_S), "orphans") == set()
    assert [storage.exists(uri) for uri in dead] == [False, True]
    assert gone(collect(root, Retention(), later_s=LATER_S), "orphans") == {begun.id}
    assert not storage.exists(dead[1]) and storage.exists(find(Registry(root), done.id).checkpoint.uri)


def test_finished_shards_of_an_interrupted_sharding_stay(tmp_path: Path) -> None:
    root = str(tmp_path)
    storage.write_json_exclusive(
        f"{root}/shard/d/v1/plan.json", {"fingerprint": "f", "identity": {"inputs": {}}}
    )
    storage.write_exclusive(f"{root}/shard/d/v1/attempts/dead/train-00000.tar", b"shard")
    storage.write_exclusive(f"{root}/shard/d/v1/parts/x/train-00000.json", b"{}")
    before = everything(root)
    collect(root, later_s=LATER_S)
    assert before.items() <= everything(root).items()


def test_folders_that_are_no_steps_stay_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes/of/mine/attempts/x").mkdir(parents=True)
    (tmp_path / "notes/of/mine/attempts/x/file").write_text("mine")
    collect(str(tmp_path), later_s=LATER_S)
    assert (tmp_path / "notes/of/mine/attempts/x/file").exists()


def test_unfinished_uploads_are_dropped_after_the_grace(real_root: str) -> None:
    run(real_root, versions("v1"))
    begin_upload(real_root, "pretrain/p/v1/attempts/dead/model.safetensors")
    assert [u.bytes for u in storage.list_uploads(real_root)] == [5 << 20]
    assert gone(collect(real_root, Retention()), "upload") == set()
    groups = collect(real_root, Retention(), later_s=LATER_S)
    assert [group.bytes for group in groups if group.kind == "upload" and group.delete] == [5 << 20]
    assert storage.list_uploads(real_root) == []
    assert storage.exists(find(Registry(real_root), "pretrain/p/v1").checkpoint.uri)


def test_a_store_that_cannot_list_uploads_is_told_and_everything_else_is_collected(
    moto_root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(moto_root, versions("v1"))
    run(moto_root, versions("v1", "v2"))
    begin_upload(moto_root, "finetune/t/v1/attempts/dead/model.safetensors")
    last = Retention(rules=(KeepRule(task="pretrain", last=1), KeepRule(task="classify", last=1)))
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.lacks = {"uploads"}
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageRefused, match="list the uploads"):
            storage.list_uploads(moto_root)
        for apply in (False, True):
            groups = collect(moto_root, last, later_s=LATER_S, apply=apply)
            [unlisted] = [group for group in groups if group.kind == "upload"]
            assert (
                not unlisted.delete
                and "cannot be listed" in unlisted.why
                and "not implemented" in unlisted.why
            )
            assert gone(groups) == {"pretrain/p/v1"}
        assert "cannot be listed" in caplog.text
    with pytest.raises(StorageUnavailable, match="gave up"):  # an outage is no store without the operation
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("ITPN_STORAGE_DEADLINE_S", "0.5")
        collect(moto_root, last, apply=False)


def test_an_upload_that_was_begun_again_under_the_name_of_a_dead_one_goes_on(moto_root: str) -> None:
    run(moto_root, versions("v1"))
    for _ in range(2):
        begin_upload(moto_root, "pretrain/p/v1/attempts/dead/model.safetensors")
    old, new = storage.list_uploads(moto_root)
    with pytest.MonkeyPatch.context() as patch:
        told = [replace(old, began=0.0), replace(new, began=time.time())]
        patch.setattr(storage, "list_uploads", lambda root: told)
        collect(moto_root, Retention())
    assert [upload.id for upload in storage.list_uploads(moto_root)] == [new.id]


def test_gc_while_steps_are_written_and_promoted_deletes_nothing_in_use(real_root: str) -> None:
    """Threads at full speed on a real store: one collects without end, one runs new chains, one promotes."""
    registry, stop = Registry(real_root), threading.Event()
    steps = versions(*(f"v{number}" for number in range(6)))
    run(real_root, [steps[0]])
    Aliases(registry).promote(find(registry, steps[0].id), "production")
    errors: list[BaseException] = []
    outcomes = {"refused": 0, "promoted": 0, "collected": 0}

    def guard(work: Callable[[], None]) -> threading.Thread:
        def body() -> None:
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        return threading.Thread(target=body)

    def gc() -> None:
        outcomes["collected"] += len(gone(collect(real_root)))

    def promote() -> None:
        for row in registry.checkpoints():
            try:
                moved = Aliases(registry).promote(row, "production").current
                outcomes["promoted"] += 1
                assert storage.exists(moved.checkpoint)
            except Deleted:
                outcomes["refused"] += 1

    threads = [guard(gc), guard(promote)]
    for thread in threads:
        thread.start()
    for number, step in enumerate(steps[1:]):
        states = Runner(real_root, "toy", [tuned(step, f"f{number}")], open_session=toys.ThreadSession).run()
        for status in states:
            assert status.state is State.DONE or isinstance(status.error, Deleted), status.error
    deadline = time.monotonic() + 60
    while not outcomes["collected"] and not errors and time.monotonic() < deadline:
        time.sleep(0.01)  # until the collector, which the others may have kept from the CPU, had its turn
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    alias = Aliases(registry).get("production")
    assert alias is not None and storage.exists(alias.current.checkpoint)
    assert len(alias.moves) == 1 + outcomes["promoted"] and outcomes["collected"] > 0
    gone_ones = Deletions(registry).done()
    for row in registry.checkpoints():
        assert storage.exists(row.checkpoint.uri) != (row.checkpoint.uri in gone_ones)
