"""Aliases such as `production`: small objects moved by compare-and-swap, which carry their whole history.

One object per alias, `{root}/registry/aliases/<name>.json`. A move replaces the object only if nobody else
has since it was read, so concurrent promotions queue up in one history and none is lost.
"""

from __future__ import annotations

import getpass
import json
import random
import re
import time
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.errors import AlreadyExists, ConfigError, ItpnError, NotFound, StorageUnavailable
from pipeline.registry.deletions import Deletions
from pipeline.registry.events import CheckpointRow, parse
from pipeline.registry.rules import check_rule, measured_by
from pipeline.registry.store import Registry
from pipeline.version import host
from stages.config import nearest

SCHEMA = 1
PATIENCE_S = 120.0  # for this long a move competes with others; 20 at once need a few seconds on S3


class RuleRefused(ItpnError):
    """A checkpoint does not fulfil the rule of a promotion."""

    exit_code = 2


class Move(BaseModel):
    """One entry of an alias's history."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    step: str
    checkpoint: str
    checkpoint_sha256: str
    by: str
    host: str
    at: str
    rule: str | None = None
    verdict: str | None = None
    rolled_back_from: str | None = None  # id of the promotion that a roll-back undid


class Alias(BaseModel):
    """An alias: the last move tells where it points."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    name: str
    moves: list[Move]

    @property
    def current(self) -> Move:
        return self.moves[-1]

    @property
    def stack(self) -> list[Move]:
        """The moves that no roll-back undid, oldest first; the last of them is where the alias points."""
        found: list[Move] = []
        for move in self.moves:
            if move.rolled_back_from is None:
                found.append(move)
            else:
                found.pop()
        return found


class Aliases:
    """The aliases of one registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._deletions = registry, Deletions(registry)

    def all(self) -> dict[str, Alias]:
        """Every alias by name."""
        uris = self._registry.ids("aliases").values()
        found: list[Alias] = [parse(uri, Alias) for uri in uris]
        return {alias.name: alias for alias in found}

    def get(self, name: str) -> Alias | None:
        """The alias, or None when there is none of this name."""
        try:
            return parse(self._uri(name), Alias)
        except NotFound:
            return None

    def promote(self, row: CheckpointRow, name: str, rule: str | None = None) -> Alias:
        """Point the alias at a checkpoint.

        With a rule (see rules.py) the checkpoint's results must fulfil it; a rule that compares with an
        alias uses what that alias points at in the very version that the move replaces, when it is this one.

        Raises:
            RuleRefused: the rule does not hold. Deleted: retention deleted the files.
            NotFound: the weights or the step's record are gone.
            ConfigError: a bad name or rule.
        """
        if not storage.exists(row.checkpoint.uri):
            self._deletions.refuse_deleted(row.checkpoint.uri)
            raise NotFound(f"{row.checkpoint.uri} is not there", remedy="promote a checkpoint that exists")
        if not storage.exists(storage.join(self._registry.root, row.step, "record.json")):
            raise NotFound(f"{row.step} has no record", remedy="promote the output of a finished step")

        def next_move(alias: Alias | None) -> Move:
            verdict = None
            if rule:
                others = {n: a.current.checkpoint_sha256 for n, a in self.all().items()}
                if alias:
                    others[name] = alias.current.checkpoint_sha256
                results = self._registry.results(**measured_by(rule))
                found = check_rule(rule, row.checkpoint.sha256, results, others, name)
                if not found.holds:
                    raise RuleRefused(
                        f"{row.step} does not become '{name}'",
                        expected=rule,
                        found=found.text,
                        remedy=found.remedy,
                    )
                verdict = found.text
            return _move(row.step, row.checkpoint.uri, row.checkpoint.sha256, rule=rule, verdict=verdict)

        return self._append(name, next_move)

    def rollback(self, name: str) -> Alias:
        """Point the alias at what it pointed at before; a second roll-back goes one further back.

        Raises ConfigError when there is nothing before, or when somebody moved the alias since it was looked at;
        Deleted or NotFound when its weights are gone.
        """
        seen: list[str] = []

        def next_move(alias: Alias | None) -> Move:
            if alias is None:
                others = list(self.all())
                remedy = nearest(name, others) if others else f"itpn checkpoints promote CHECKPOINT {name}"
                raise ConfigError(f"there is no alias '{name}'", remedy=remedy)
            seen.append(alias.current.id)
            if seen[0] != alias.current.id:  # what was to be undone is not the newest move any more
                raise ConfigError(
                    f"'{name}' was moved meanwhile, and was not rolled back",
                    found=f"it points at {alias.current.step}",
                    remedy=f"itpn checkpoints history {name}, and roll back again if that is still wanted",
                )
            stack = alias.stack
            if len(stack) < 2:
                raise ConfigError(
                    f"'{name}' has nothing to go back to",
                    found="it is at its first checkpoint",
                    remedy="itpn checkpoints promote CHECKPOINT " + name,
                )
            before = stack[-2]
            if not storage.exists(before.checkpoint):
                self._deletions.refuse_deleted(before.checkpoint)
                raise NotFound(f"{before.checkpoint} is not there", remedy="promote another checkpoint")
            undone = stack[-1]  # not the newest move: that may be a roll-back itself
            return _move(before.step, before.checkpoint, before.checkpoint_sha256, rolled_back_from=undone.id)

        return self._append(name, next_move)

    def _append(self, name: str, next_move) -> Alias:  # next_move: (Alias | None) -> Move
        """Add the move that `next_move` makes of the alias as it is, however often others are quicker."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
            raise ConfigError(
                f"'{name}' is no name of an alias", expected="a-z, 0-9, '.', '_', '-'; at most 64 characters"
            )
        self._registry.check_store()
        with ExitStack() as pins:
            return self._move(name, next_move, pins)

    def _move(self, name: str, next_move, pins: ExitStack) -> Alias:
        uri, began, pause_s = self._uri(name), time.monotonic(), 0.01
        pinned: set[str] = set()
        while time.monotonic() - began < PATIENCE_S:
            try:
                data, version = storage.read_versioned(uri)
                alias: Alias | None = Alias.model_validate_json(data)
            except NotFound:
                alias, version = None, ""
            move = next_move(alias)
            if move.checkpoint not in pinned:  # before the alias, so that no deletion can come in between
                pins.enter_context(self._deletions.pinned(move.checkpoint, f"'{name}' is moved to it"))
                pinned.add(move.checkpoint)
            moves = [*(alias.moves if alias else []), move]
            wanted = Alias(name=name, moves=moves)
            data = json.dumps(wanted.model_dump(mode="json")).encode()
            if alias is None:
                try:
                    storage.write_exclusive(uri, data)
                    return wanted
                except AlreadyExists:
                    pass
            elif storage.replace_if(uri, data, version):
                return wanted
            # Refused. Yet an answer that was lost on its way may have hidden that ours was first and others followed.
            now = self.get(name)
            if now and any(other.id == move.id for other in now.moves):
                return now
            time.sleep(random.uniform(0, pause_s))
            pause_s = min(2 * pause_s, 0.5)
        raise StorageUnavailable(
            f"the alias '{name}' could not be moved in {PATIENCE_S:g} s",
            found="other moves were always quicker",
            remedy="try again",
        )

    def _uri(self, name: str) -> str:
        return storage.join(self._registry.uri, "aliases", f"{name}.json")


def _move(step: str, uri: str, sha256: str, **more: str | None) -> Move:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return Move(
        id=uuid.uuid4().hex,
        step=step,
        checkpoint=uri,
        checkpoint_sha256=sha256,
        by=user,
        host=host(),
        at=at,
        **more,
    )
