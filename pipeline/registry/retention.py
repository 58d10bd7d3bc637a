"""What a recipe wants kept: data, judged without touching storage.

A finished checkpoint may go only where a rule covers it and nothing in that rule keeps it. The default has no
rule: everything finished stays. What is in use stays whatever a rule says (garbage.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from pydantic import Field, model_validator

from cluster.errors import ConfigError
from pipeline.record import Record
from pipeline.registry.events import ResultRow
from pipeline.registry.metrics import direction
from pipeline.registry.store import better_first
from stages.artifacts import CheckpointRef
from stages.config import Config

DAY_S = 86400.0


class KeepRule(Config):
    """What stays of a recipe's checkpoints of one task; what none of the fields keeps, goes.

    Args:
        task: which checkpoints it is about.
        last: the newest so many versions of each step (`pretrain/demo`) stay.
        best: so many of the recipe stay, the best by `metric` (`DATASET/SPLIT/METRIC`); without a result none counts
            as better, and it stays. Where equal names are different data, so many of each.
        lower_is_better: direction of a metric that is not known (metrics.py).
        newer_than_days: what was finished later stays.
    """

    task: Literal["pretrain", "classify"]
    last: int | None = Field(default=None, ge=0)
    best: int | None = Field(default=None, ge=1)
    metric: str = ""
    lower_is_better: bool | None = None
    newer_than_days: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> KeepRule:
        if self.best is not None and self.metric.count("/") < 2:
            raise ValueError("'best' needs metric = DATASET/SPLIT/METRIC")
        if self.best is not None:
            try:
                direction(self.metric.rpartition("/")[2], self.lower_is_better)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if self.last is None and self.best is None and self.newer_than_days is None:
            raise ValueError("a rule says what to keep: last, best or newer_than_days")
        return self


class Retention(Config):
    """What stays of one recipe's output.

    Args:
        rules: for finished checkpoints, at most one for each task.
        training_checkpoints: how many of a finished step's newest training checkpoints stay, beside those that its
            config keeps (`checkpoint.keep_every_steps`, `keep_best`); an unfinished step keeps all of its own.
        grace_hours: what no record names stays for so long after it was written: somebody may be at work.
    """

    rules: tuple[KeepRule, ...] = ()
    training_checkpoints: int = Field(default=0, ge=0)
    grace_hours: float = Field(default=24.0, ge=1)

    @model_validator(mode="after")
    def _one_rule_each(self) -> Retention:
        tasks = [rule.task for rule in self.rules]
        if len(set(tasks)) < len(tasks):
            raise ValueError("more than one rule for a task")
        return self


def judge(
    policy: Retention, records: Sequence[Record], results: Sequence[ResultRow], now: float
) -> dict[str, tuple[bool, str]]:
    """For each finished checkpoint of one recipe, by step: whether the policy keeps it, and why.

    Args:
        records: of this recipe's checkpoints; those of other artifacts are passed over.
        results: of any checkpoints; only those that a `best` asks for are looked at.
        now: seconds since the epoch.
    """
    verdicts: dict[str, tuple[bool, str]] = {}
    rules = {rule.task: rule for rule in policy.rules}
    for task in ("pretrain", "classify"):
        members = [r for r in records if isinstance(r.artifact, CheckpointRef) and r.artifact.task == task]
        if task not in rules:
            verdicts |= {r.step: (True, "finished, and no rule is about it") for r in members}
        else:
            verdicts |= _apply(rules[task], members, results, now)
    return verdicts


def _apply(
    rule: KeepRule, members: list[Record], results: Sequence[ResultRow], now: float
) -> dict[str, tuple[bool, str]]:
    kept: dict[str, str] = {}
    if rule.newer_than_days is not None:
        for record in members:
            age_days = (now - datetime.fromisoformat(record.finished_at).timestamp()) / DAY_S
            if age_days < rule.newer_than_days:
                kept.setdefault(record.step, f"newer than {rule.newer_than_days:g} days")
    if rule.last is not None:
        versions: dict[str, list[Record]] = {}
        for record in sorted(members, key=lambda r: r.finished_at, reverse=True):
            versions.setdefault(record.step.rpartition("/")[0], []).append(record)
        for same in versions.values():
            for record in same[: rule.last]:
                kept.setdefault(record.step, f"among the last {rule.last} of its step")
    if rule.best is not None:
        kept = _best(rule, members, results) | kept
    return {r.step: (r.step in kept, kept.get(r.step) or _missed(rule)) for r in members}


def _best(rule: KeepRule, members: list[Record], results: Sequence[ResultRow]) -> dict[str, str]:
    dataset, split, metric = rule.metric.rsplit("/", 2)
    newest: dict[str | None, dict[str, ResultRow]] = defaultdict(dict)  # data -> sha256 -> newest result
    for row in results:
        if (row.dataset, row.split, row.metric) == (dataset, split, metric) and not row.variant:
            newest[row.evaluated_fingerprint][row.checkpoint_sha256] = row
    kept: dict[str, str] = {}
    lower = direction(metric, rule.lower_is_better)
    for rows in newest.values():
        ordered = better_first(list(rows.values()), lower=lower)
        order = {row.checkpoint_sha256: place for place, row in enumerate(ordered)}
        judged = sorted((r for r in members if _sha256(r) in order), key=lambda r: order[_sha256(r)])
        kept |= {r.step: f"among the best {rule.best} by {rule.metric}" for r in judged[: rule.best]}
    measured = {sha256 for rows in newest.values() for sha256 in rows}
    unjudged = (r.step for r in members if _sha256(r) not in measured)
    return kept | {step: f"it has no result {rule.metric} yet" for step in unjudged}


def _sha256(record: Record) -> str:
    assert isinstance(record.artifact, CheckpointRef)
    return record.artifact.sha256


def _missed(rule: KeepRule) -> str:
    parts = []
    if rule.last is not None:
        parts.append(f"not among the last {rule.last} of its step")
    if rule.best is not None:
        parts.append(f"not among the best {rule.best} by {rule.metric}")
    if rule.newer_than_days is not None:
        parts.append(f"older than {rule.newer_than_days:g} days")
    return ", ".join(parts)
