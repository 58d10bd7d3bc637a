"""Deletes what nothing needs: `survey` says what would go and why, `collect` does it.

Never goes: what an alias points at (and what a roll-back of it would), what a promotion or an unfinished step is
about to use, what a kept step was made from, data sets, records, results. A checkpoint goes by the protocol of
deletions.py; the files of an unfinished step's dead attempts go with that step's lease in hand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cluster import storage
from cluster.errors import DataInvalid, LeaseHeld, StorageRefused
from cluster.lease import Lease, holder_of
from cluster.storage import Upload
from pipeline.registry import inventory
from pipeline.registry.aliases import Aliases
from pipeline.registry.deletions import Deletion, Deletions, Mark, key
from pipeline.registry.inventory import Group, StepFolder
from pipeline.registry.retention import Retention, judge
from pipeline.registry.store import Registry
from stages.artifacts import EvaluationRef

log = logging.getLogger(__name__)

UNLISTED = "(not listed)"
Policies = Callable[[str], Retention]  # recipe -> what it wants kept; "" for what belongs to none
ALIAS_DEPTH = 2  # the checkpoint that an alias points at, and the one that a roll-back goes to


@dataclass(frozen=True)
class Survey:
    """What was found under a root at one time."""

    folders: dict[str, StepFolder]
    gone: dict[str, Deletion]  # step -> the decision that its checkpoint's files go
    verdicts: dict[str, tuple[bool, str]]  # step -> whether its checkpoint stays, and why
    stale_pins: list[str]

    @property
    def candidates(self) -> list[str]:
        """Checkpoints that may go, descendants before what they were made from."""
        found = [step for step, (keep, _) in self.verdicts.items() if not keep]
        return sorted(found, key=lambda step: (-self._depth(step), step))

    def children(self, step: str) -> set[str]:
        """Finished steps that were made from this one and whose files are there."""
        return {
            id_
            for id_, folder in self.folders.items()
            if _lasting(folder) and id_ not in self.gone and step in _inputs(folder)
        }

    def _depth(self, step: str) -> int:
        folder = self.folders.get(step)
        return 1 + max((self._depth(s) for s in _inputs(folder)), default=0) if folder else 0


def survey(registry: Registry, policies: Policies, now: float | None = None) -> Survey:
    """Look at every reference and every step. `now` is in seconds since the epoch."""
    now = time.time() if now is None else now
    deletions = Deletions(registry)
    # This order matters: a pin is removed only after its alias was moved, and a plan is followed by a record.
    pins, stale = deletions.pins()
    aliases = Aliases(registry).all()
    decided = deletions.done()
    folders = inventory.read(registry.root)

    finished = {id_: folder for id_, folder in folders.items() if folder.record is not None}
    made = {id_: c for id_, folder in finished.items() if (c := folder.checkpoint) is not None}
    gone = {id_: decided[c.uri] for id_, c in made.items() if c.uri in decided}
    used: dict[str, str] = {}
    for name, alias in aliases.items():
        for place, move in enumerate(reversed(alias.stack[-ALIAS_DEPTH:])):
            for id_, checkpoint in made.items():
                if checkpoint.uri == move.checkpoint:
                    used.setdefault(id_, f"'{name}' {'would roll back to' if place else 'points at'} it")
    for id_, checkpoint in made.items():
        if key(checkpoint.uri) in pins:
            used.setdefault(id_, "somebody is about to promote it")
    for folder in folders.values():
        for id_ in _needed_by(folder, finished):
            used.setdefault(id_, f"{folder.id} is unfinished and needs it")

    judged = _judge(registry, policies, made, finished, now)
    verdicts = {id_: (True, used[id_]) if id_ in used else v for id_, v in judged.items() if id_ not in gone}
    # What is kept needs what it was made from.
    kept = [id_ for id_, f in finished.items() if _lasting(f) and id_ not in gone]
    kept = [id_ for id_ in kept if verdicts.get(id_, (True, ""))[0]] + list(used)
    seen: set[str] = set()
    while kept:
        child = kept.pop()
        seen.add(child)
        for parent in _inputs(folders[child]):
            if parent in verdicts and not verdicts[parent][0]:
                verdicts[parent] = (True, f"{child} was made from it")
            if parent in folders and parent not in seen:
                kept.append(parent)
    return Survey(folders, gone, verdicts, stale)


def plan(registry: Registry, policies: Policies, now: float | None = None) -> list[Group]:
    """The dry run: every group of objects, whether it would go, and why."""
    now = time.time() if now is None else now
    found = survey(registry, policies, now)
    groups = []
    for id_, folder in found.folders.items():
        recipe = folder.record.recipe if folder.record else ""
        if id_ in found.gone:
            groups += inventory.output(
                folder, True, f"decided on {found.gone[id_].at[:19]}, and not all gone"
            )
        else:
            keep, why = found.verdicts.get(id_, (True, ""))
            groups += inventory.output(folder, not keep, why)
        groups += inventory.training_state(folder, policies(recipe))
        grace_s = policies(recipe).grace_hours * 3600
        holder = None if folder.record else holder_of(_lease(folder))
        groups += inventory.orphans(folder, grace_s, now, holder)
    return groups + [group for group, _ in _uploads(registry, found, policies, now)] + _pins(found)


def collect(registry: Registry, policies: Policies, now: float | None = None) -> list[Group]:
    """Delete what `plan` lists, unless something came to need it meanwhile; returns what was done with each group.

    Raises PreflightError where the store ignores preconditions.
    """
    now = time.time() if now is None else now
    registry.check_store()
    deletions, first = Deletions(registry), survey(registry, policies, now)
    marks: dict[str, Mark] = {}
    for id_ in first.candidates:
        folder = first.folders[id_]
        assert folder.record and folder.checkpoint
        mark = deletions.mark(folder.record.recipe, id_, folder.checkpoint, first.verdicts[id_][1])
        if mark is not None:
            marks[id_] = mark
    # Whoever refers to a marked checkpoint from here on sees the mark; whoever did before is seen now.
    second = survey(registry, policies, now) if marks else first
    decided = _decide(deletions, second, marks)
    objected = {id_ for id_ in first.candidates if id_ not in decided}

    groups: list[Group] = []
    for id_, folder in second.folders.items():
        recipe = folder.record.recipe if folder.record else ""
        going = decided.get(id_) or second.gone.get(id_)
        if going:
            registry.append([("deletions", going.event)])
            groups += _delete(inventory.output(folder, True, going.why))
        elif id_ in objected:
            keep, why = second.verdicts.get(id_, (True, ""))
            groups += inventory.output(folder, False, why if keep else "somebody came to need it meanwhile")
        else:
            groups += inventory.output(folder, False, second.verdicts.get(id_, (True, ""))[1])
        groups += _delete(inventory.training_state(folder, policies(recipe)))
        groups += _orphans(registry, folder, policies(recipe).grace_hours * 3600, now)
    for group, upload in _uploads(registry, second, policies, now):
        if group.delete and upload is not None:
            storage.abort_upload(upload)
        groups.append(group)
    return groups + _delete(_pins(second))


def _decide(deletions: Deletions, found: Survey, marks: dict[str, Mark]) -> dict[str, Deletion]:
    """Commit or withdraw each mark, descendants first; what a descendant that stays was made from, stays."""
    decided: dict[str, Deletion] = {}
    for id_ in sorted(marks, key=lambda step: (-found._depth(step), step)):
        keep, why = found.verdicts.get(id_, (True, "its record is gone"))
        if keep:
            deletions.spare(marks[id_], why)
        elif staying := found.children(id_) - decided.keys():
            deletions.spare(marks[id_], f"{min(staying)} was made from it")
        elif (decision := deletions.commit(marks[id_])) is not None:
            decided[id_] = decision
    return decided


def _judge(
    registry: Registry, policies: Policies, made: dict, finished: dict[str, StepFolder], now: float
) -> dict[str, tuple[bool, str]]:
    recipes: dict[str, list] = {}
    for id_ in made:
        record = finished[id_].record
        assert record is not None
        recipes.setdefault(record.recipe, []).append(record)
    asked = any(rule.best is not None for recipe in recipes for rule in policies(recipe).rules)
    results = registry.results() if asked else []
    verdicts: dict[str, tuple[bool, str]] = {}
    for recipe, records in recipes.items():
        verdicts |= judge(policies(recipe), records, results, now)
    return verdicts


def _lasting(folder: StepFolder) -> bool:
    """Whether the step made something that is used by itself; an evaluation's figures do not need its weights."""
    return folder.record is not None and not isinstance(folder.record.artifact, EvaluationRef)


def _inputs(folder: StepFolder) -> list[str]:
    return [needed.step for needed in folder.record.inputs.values()] if folder.record else []


def _needed_by(folder: StepFolder, finished: dict[str, StepFolder]) -> list[str]:
    """The steps that an unfinished one reads; its plan names inputs by fingerprint, adopted weights by sha256."""
    if folder.plan is None:
        return []
    try:
        wanted = set(folder.plan["identity"]["inputs"].values())
        adopted = folder.plan["identity"].get("config", {}).get("sha256")
    except (KeyError, TypeError, AttributeError):
        raise DataInvalid(
            f"the plan {folder.uri}/plan.json cannot be read, so nobody knows what the step needs",
            remedy="restore it, or delete the folder of that unfinished step",
        ) from None
    needed = []
    for id_, other in finished.items():
        assert other.record is not None
        same = adopted is not None and other.checkpoint is not None and other.checkpoint.sha256 == adopted
        if same or other.record.fingerprint in wanted:
            needed.append(id_)
    return needed


def _lease(folder: StepFolder) -> str:
    return storage.join(folder.uri, "lease")


def _orphans(registry: Registry, folder: StepFolder, grace_s: float, now: float) -> list[Group]:
    """Delete a step's orphans; those of an unfinished one with its lease held, so that no runner is at work."""
    groups = inventory.orphans(folder, grace_s, now)
    if folder.record is not None or not any(group.delete for group in groups):
        return _delete(groups)
    try:
        with Lease.acquire(_lease(folder), owner="gc"):
            return _delete(inventory.orphans(inventory.again(registry.root, folder), grace_s, now))
    except LeaseHeld as error:
        return [replace(group, delete=False, why=f"at work: {error.message}") for group in groups]


def _uploads(
    registry: Registry, found: Survey, policies: Policies, now: float
) -> list[tuple[Group, Upload | None]]:
    """Each unfinished upload with its group; of a store that cannot list them, one group without an upload."""
    try:
        unfinished = storage.list_uploads(registry.root)
    except StorageRefused as error:  # some stores lack the operation, some users the right to it
        why = f"unfinished uploads cannot be listed: {error.found}"
        log.warning("%s; what they left stays, the rest of gc goes on", why)
        return [(Group("", "upload", UNLISTED, (), 0, False, why), None)]
    groups: list[tuple[Group, Upload | None]] = []
    grace_s = policies("").grace_hours * 3600
    for upload in unfinished:
        path = upload.uri.removeprefix(registry.root + "/")
        step = "/".join(path.split("/")[:3])
        folder = found.folders.get(step)
        holder = holder_of(_lease(folder)) if folder else None
        delete, why = now - upload.began >= grace_s and holder is None, "begun and never finished"
        if holder is not None:
            why = f"at work: {holder}"
        elif not delete:
            why = f"begun {(now - upload.began) / 3600:.1f} h ago, within the {grace_s / 3600:g} h of grace"
        group = Group(step if folder else "", "upload", path, (upload.uri,), upload.bytes, delete, why)
        groups.append((group, upload))
    return groups


def _pins(found: Survey) -> list[Group]:
    why = "left by a promotion that died"
    return [Group("", "pin", uri.rpartition("/")[2], (uri,), 0, True, why) for uri in found.stale_pins]


def _delete(groups: list[Group]) -> list[Group]:
    for group in groups:
        if group.delete:
            with ThreadPoolExecutor(16) as pool:
                # Manifests before what they name, so that no half of a checkpoint is ever listed.
                list(pool.map(storage.delete, [uri for uri in group.uris if uri.endswith(".json")]))
                list(pool.map(storage.delete, [uri for uri in group.uris if not uri.endswith(".json")]))
    return groups
