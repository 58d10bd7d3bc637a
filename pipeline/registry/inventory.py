"""What lies under a root, step by step, and what in each step's folder nothing needs any more.

Judged from the folder's own commit marks (the record, manifests of training checkpoints), never from names alone;
folders without a plan or a record are nobody's here and stay untouched.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster import storage
from cluster.errors import NotFound
from cluster.storage import ObjectInfo
from pipeline.record import Record
from pipeline.registry.lineage import read_record
from pipeline.registry.retention import Retention
from stages.artifacts import CheckpointRef, DatasetRef

STAYS = ("config.json", "metrics.jsonl")  # what a deleted checkpoint was, and its curves: kilobytes
_MANIFEST = re.compile(r"checkpoints/(\d{9})\.json")


@dataclass(frozen=True)
class Group:
    """Objects that go or stay together, and why."""

    step: str
    kind: str  # checkpoint, data set, training state, orphans, upload, pin
    name: str
    uris: tuple[str, ...]
    bytes: int
    delete: bool
    why: str


@dataclass(frozen=True)
class StepFolder:
    """One step's output: its objects by relative path, and its record, or the plan while there is none."""

    id: str
    uri: str
    files: dict[str, ObjectInfo]
    record: Record | None
    plan: dict[str, Any] | None

    def group(self, kind: str, name: str, paths: list[str], delete: bool, why: str) -> Group:
        infos = [self.files[path] for path in paths if path in self.files]
        uris = tuple(info.uri for info in infos)
        return Group(self.id, kind, name, uris, sum(info.bytes for info in infos), delete, why)

    @property
    def checkpoint(self) -> CheckpointRef | None:
        """The consolidated weights that the step made, if it has made any."""
        return (
            self.record.artifact if self.record and isinstance(self.record.artifact, CheckpointRef) else None
        )


def read(root: str) -> dict[str, StepFolder]:
    """Every step under the root, by id. Raises DataInvalid for a record or plan that cannot be read."""
    root = storage.join(root)
    found: dict[str, dict[str, ObjectInfo]] = {}
    for info in storage.list_files(root):
        kind, _, rest = info.uri.removeprefix(root + "/").partition("/")
        if kind != "registry" and rest.count("/") >= 2:
            name, version, path = rest.split("/", 2)
            found.setdefault(f"{kind}/{name}/{version}", {})[path] = info
    steps = {id_: files for id_, files in found.items() if "record.json" in files or "plan.json" in files}
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(steps, pool.map(lambda id_: _folder(root, id_, steps[id_]), steps), strict=True))


def again(root: str, folder: StepFolder) -> StepFolder:
    """The same folder as it is now."""
    prefix = folder.uri + "/"
    return _folder(root, folder.id, {i.uri.removeprefix(prefix): i for i in storage.list_files(folder.uri)})


def _folder(root: str, id_: str, files: dict[str, ObjectInfo]) -> StepFolder:
    uri = storage.join(root, id_)
    if "record.json" in files:
        return StepFolder(id_, uri, files, read_record(root, id_), None)
    plan = storage.read_json(storage.join(uri, "plan.json")) if "plan.json" in files else None
    return StepFolder(id_, uri, files, None, plan)


def output(folder: StepFolder, delete: bool, why: str) -> list[Group]:
    """What a finished step hands on: weights (less what STAYS), or a data set."""
    record = folder.record
    if record is None or not isinstance(record.artifact, CheckpointRef | DatasetRef):
        return []
    if isinstance(record.artifact, DatasetRef):
        paths = [info.path for info in record.files]
        return [folder.group("data set", record.artifact.name, paths, False, "data sets stay")]
    paths = [info.path for info in record.files if info.path.rpartition("/")[2] not in STAYS]
    group = folder.group("checkpoint", record.artifact.sha256[:12], paths, delete, why)
    return [group] if group.uris else []


def training_state(folder: StepFolder, policy: Retention) -> list[Group]:
    """The training checkpoints of a step: all needed while it is unfinished, hardly any after that."""
    manifests = {int(m[1]): path for path in folder.files if (m := _MANIFEST.fullmatch(path))}
    parts = [path for path in folder.files if path.startswith(("checkpoints/files/", "checkpoints/damaged/"))]
    if folder.record is None:
        named = {path for manifest in manifests.values() for path in _named(folder, manifest)}
        paths = [*manifests.values(), *(path for path in parts if path in named)]
        group = folder.group(
            "training state", "checkpoints", paths, False, "unfinished: it goes on from them"
        )
        return [group] if group.uris else []
    chosen = _configured(folder, manifests)
    if policy.training_checkpoints:
        for step in sorted(manifests)[-policy.training_checkpoints :]:
            chosen.setdefault(step, f"among the last {policy.training_checkpoints} training checkpoints")
    groups, needed = [], set()
    for step, why in chosen.items():
        paths = [manifests[step], *_named(folder, manifests[step])]
        needed.update(paths)
        groups.append(folder.group("training state", f"step {step}", paths, False, why))
    going = [path for path in [*manifests.values(), *parts] if path not in needed]
    rest = folder.group("training state", "checkpoints", going, True, "finished: nothing resumes from them")
    return [*groups, *([rest] if rest.uris else [])]


def orphans(folder: StepFolder, grace_s: float, now: float, holder: object = None) -> list[Group]:
    """Files of attempts that nothing names.

    Args:
        grace_s: what was written less than so long ago stays.
        now: seconds since the epoch.
        holder: who holds the step's lease; an unfinished step that is held keeps everything.
    """
    finished = folder.record is not None
    if finished:
        assert folder.record is not None
        named = {info.path for info in folder.record.files}
        paths = [path for path in folder.files if path.startswith("attempts/") and path not in named]
    else:
        named = {path for m in folder.files if _MANIFEST.fullmatch(m) for path in _named(folder, m)}
        damaged = [path for path in folder.files if path.startswith("checkpoints/damaged/")]
        named |= {path for manifest in damaged for path in _named(folder, manifest)}
        places = ["checkpoints/files/"]
        if not any(path.startswith("parts/") for path in folder.files):
            places.append("attempts/")  # with parts they hold finished shards, which the record will name
        paths = [path for path in folder.files if path.startswith(tuple(places)) and path not in named]
    attempts: dict[str, list[str]] = {}
    for path in paths:
        depth = 2 if path.startswith("attempts/") else 3
        attempts.setdefault("/".join(path.split("/")[:depth]), []).append(path)
    groups = []
    for name, members in attempts.items():
        age_s = now - max(info.mtime for path, info in folder.files.items() if path.startswith(name + "/"))
        if holder is not None and not finished:
            delete, why = False, f"at work: {holder}"
        elif age_s < grace_s:
            delete, why = False, f"written {age_s / 3600:.1f} h ago, within the {grace_s / 3600:g} h of grace"
        else:
            delete, why = True, "the record names another attempt" if finished else "no manifest names it"
        groups.append(folder.group("orphans", name, members, delete, why))
    return groups


def _configured(folder: StepFolder, manifests: dict[int, str]) -> dict[int, str]:
    """The training checkpoints that a finished step's own config asks to keep for good, and why."""
    assert folder.record is not None
    config = folder.record.config.get("checkpoint") or {}
    every, best, by = config.get("keep_every_steps"), config.get("keep_best"), config.get("best_by")
    chosen = {
        s: f"its config keeps every {every} steps" for s in sorted(manifests) if every and s % every == 0
    }
    if best and by:
        means = {
            s: storage.read_json(folder.files[path].uri).get("means", {}) for s, path in manifests.items()
        }
        ranked = sorted((found.get(by, math.inf), step) for step, found in means.items())
        chosen = {step: f"its config keeps the best {best} by {by}" for _, step in ranked[:best]} | chosen
    return chosen


def _named(folder: StepFolder, manifest: str) -> list[str]:
    """The files that a training checkpoint's manifest names; none when it was deleted meanwhile."""
    try:
        return [info["path"] for info in storage.read_json(folder.files[manifest].uri)["files"]]
    except NotFound:
        return []
