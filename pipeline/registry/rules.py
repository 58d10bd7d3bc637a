"""Rules of promotion: `DATASET/SPLIT/METRIC OP NUMBER`, or `… OP ALIAS [± NUMBER]`.

imagenet-1k/val/top1 >= production - 0.1
demo/val/loss < 2.0
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence

from cluster.errors import ConfigError
from pipeline.registry.events import ResultRow
from stages.config import nearest

_RULE = re.compile(r"^\s*(\S+)/([^/\s]+)/([^/\s]+)\s*(>=|<=|>|<)\s*(\S+)(?:\s*([+-])\s*([\d.eE]+))?\s*$")
_SHIFTED = re.compile(r"^(.+?)([+-])(\d[\d.eE]*)$")
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def check_rule(
    rule: str,
    sha256: str,
    results: Sequence[ResultRow],
    aliases: Mapping[str, str],
    moving: str | None = None,
) -> tuple[bool, str]:
    """Whether the checkpoint with these weights fulfils the rule, and the figures it was judged by.

    Args:
        sha256: of the candidate's weights; its newest result of the metric counts, of those that were
            measured on the model as it was trained (no acceleration, resolution or labels put in its place).
        aliases: alias -> sha256 of what it points at.
        moving: the alias that is to be moved. When it is the one compared with and does not exist yet, every
            candidate that has the result passes.

    Raises ConfigError for a rule that cannot be read, or that names another alias which does not exist.
    """
    match = _RULE.match(rule)
    if not match:
        raise ConfigError(
            f"'{rule}' is no rule",
            expected="DATASET/SPLIT/METRIC OP NUMBER or ALIAS [+- NUMBER], as in "
            "'imagenet-1k/val/top1 >= production - 0.1'",
        )
    dataset, split, metric, compare, right, sign, shift = match.groups()
    if not shift and not _is_number(right) and right not in aliases and right != moving:
        close = _SHIFTED.match(right)  # written without spaces; '-' and digits may be part of a name, too
        if close and (close[1] in aliases or close[1] == moving):
            right, sign, shift = close.groups()

    def newest(digest: str) -> float | None:
        rows = [r for r in results if r.checkpoint_sha256 == digest and not r.variant]
        rows = [r for r in rows if (r.dataset, r.split, r.metric) == (dataset, split, metric)]
        return rows[-1].value if rows else None

    value = newest(sha256)
    if value is None:
        return False, f"it has no result {dataset}/{split}/{metric}"
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
            return True, f"{metric} {value:g}; there is no '{right}' yet"
        current = newest(aliases[right])
        if current is None:
            return False, f"'{right}' has no result {dataset}/{split}/{metric}"
        limit = current
    if shift:
        try:
            limit += float(shift) if sign == "+" else -float(shift)
        except ValueError:
            raise ConfigError(f"'{shift}' is no number", expected="as in 'production - 0.1'") from None
    return _COMPARE[compare](value, limit), f"{metric} {value:g} against {limit:g}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
