"""How numbers, sizes and times are written for people: with units, and no more digits than they deserve."""

from __future__ import annotations

import math


def plain(value: float) -> str:
    """Four significant digits, thousands apart by commas: 12,480, 0.0731, 2.1e-06, nan."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e15:
        digits = max(3 - math.floor(math.log10(abs(value))), 0)
        return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def size(count: int) -> str:
    """Bytes as text: 873 B, 5.5 MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float | None) -> str:
    """Seconds as text: 0.4 s, 47 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for name, of, below in (("d", 86400, "h"), ("h", 3600, "min"), ("min", 60, "s")):
        if whole >= of:
            rest = whole % of // {"h": 3600, "min": 60, "s": 1}[below]
            return f"{whole // of} {name} {rest} {below}" if rest else f"{whole // of} {name}"
    return f"{whole} s"


def moment(at: str) -> str:
    """An ISO time as `2026-11-22 16:40` (times in the registry are UTC)."""
    return at[:16].replace("T", " ")
