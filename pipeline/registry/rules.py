"""Rules of promotion: `DATASET/SPLIT/METRIC OP NUMBER`, or `… OP ALIAS [± NUMBER]`.

imagenet-1k/val/top1 >= production - 0.1
demo/val/loss < 2.0
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cluster.errors import ConfigError
from pipeline.registry.evaluated import data_names, data_of
from pipeline.registry.events import ResultRow
from pipeline.registry.metrics import known_direction, way
from stages.config import nearest

_RULE = re.compile(r"^\s*(\S+)/([^/\s]+)/([^/\s]+)\s*(>=|<=|>|<)\s*(\S+)(?:\s*([+-])\s*([\d.eE]+))?\s*$")
_SHIFTED = re.compile(r"^(.+?)([+-])(\d[\d.eE]*)$")
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Verdict(NamedTuple):
    """Whether a rule holds, by which figures, and what can be done where it does not."""

    holds: bool
    text: str
    remedy: str = "promote a better one, or leave the rule out"


def measured_by(rule: str) -> dict[str, str]:
    """`dataset`, `split` and `metric` that a rule is about. Raises ConfigError for one that cannot be read."""
    return dict(zip(("dataset", "split", "metric"), _parts(rule)[:3], strict=True))


def check_rule(
    rule: str,
    sha256: str,
    results: Sequence[ResultRow],
    aliases: Mapping[str, str],
    moving: str | None = None,
) -> Verdict:
    """Whether the checkpoint with these weights fulfils the rule, and the figures it was judged by.

    Args:
        sha256: of the candidate's weights; its newest result of the metric counts, of those that were
            measured on the model as it was trained (no acceleration, resolution or labels put in its place). Beside
            an alias the newest pair counts that was measured on the same data; without one the rule does not hold.
        results: oldest first.
        aliases: alias -> sha256 of what it points at.
        moving: the alias that is to be moved. When it is the one compared with and does not exist yet, every
            candidate that has the result passes.

    Raises ConfigError for a rule that cannot be read, that asks for worse values of a known metric than an alias has,
    or that names another alias which does not exist.
    """
    dataset, split, metric, compare, right, sign, shift = _parts(rule)
    if not shift and not _is_number(right) and right not in aliases and right != moving:
        close = _SHIFTED.match(right)  # written without spaces; '-' and digits may be part of a name, too
        if close and (close[1] in aliases or close[1] == moving):
            right, sign, shift = close.groups()

    if not _is_number(right):
        _require_direction(rule, metric, compare)

    def by_data(digest: str) -> dict[str | None, ResultRow]:
        rows = [r for r in results if r.checkpoint_sha256 == digest and not r.variant]
        rows = [r for r in rows if (r.dataset, r.split, r.metric) == (dataset, split, metric)]
        return {row.evaluated_fingerprint: row for row in rows}

    mine = by_data(sha256)
    if not mine:
        return Verdict(
            False, f"it has no result {dataset}/{split}/{metric}", "evaluate it first, or leave the rule out"
        )
    row = max(mine.values(), key=lambda row: row.created_at)
    try:
        limit = float(right)
    except ValueError:
        if right not in aliases and right != moving:
            raise ConfigError(
                f"the rule '{rule}' compares with '{right}', and there is no such alias",
                expected=", ".join(sorted(aliases)) or "a number: there is no alias yet",
                remedy=nearest(right, sorted(aliases)),
            ) from None
        if right not in aliases:
            return Verdict(True, f"{metric} {row.value:g}; there is no '{right}' yet")
        theirs = by_data(aliases[right])
        if not theirs:
            return Verdict(
                False,
                f"'{right}' has no result {dataset}/{split}/{metric}",
                f"evaluate what '{right}' points at, or leave the rule out",
            )
        common = [(mine[data], theirs[data]) for data in mine if data in theirs]
        if not common:
            names = data_names(data_of(r) for r in (*mine.values(), *theirs.values()))
            told = [" and ".join(names[data_of(r)] for r in rows.values()) for rows in (mine, theirs)]
            return Verdict(
                False,
                f"the data differ: it was measured on {told[0]}, '{right}' on {told[1]}",
                "evaluate both on the same data, or leave the rule out",
            )
        row, other = max(common, key=lambda pair: (pair[0].created_at, pair[1].created_at))
        limit = other.value
    if shift:
        try:
            limit += float(shift) if sign == "+" else -float(shift)
        except ValueError:
            raise ConfigError(f"'{shift}' is no number", expected="as in 'production - 0.1'") from None
    return Verdict(_COMPARE[compare](row.value, limit), f"{metric} {row.value:g} against {limit:g}")


def _parts(rule: str) -> tuple[str, ...]:
    match = _RULE.match(rule)
    if not match:
        raise ConfigError(
            f"'{rule}' is no rule",
            expected="DATASET/SPLIT/METRIC OP NUMBER or ALIAS [+- NUMBER], as in "
            "'imagenet-1k/val/top1 >= production - 0.1'",
        )
    return match.groups()


def _require_direction(rule: str, metric: str, compare: str) -> None:
    """A rule that compares with an alias keeps worse ones out; a bound may stand on either side of a number."""
    lower = known_direction(metric)
    if lower is not None and compare.startswith(">") == lower:
        wanted = compare.replace(*("><" if lower else "<>"))
        raise ConfigError(
            f"the rule '{rule}' lets only worse ones pass",
            expected=f"'{wanted}': {way(lower)} values of {metric} are better",
            found=f"'{compare}'",
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
