"""Numbers of a run as Prometheus gauges."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def publish_gauges(values: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Set Prometheus gauges (`ray_itpn_<name>`, labels `tags`) that Ray's node agents export; does nothing outside Ray.

    The same name must always come with the same keys of `tags`.
    """
    ray = sys.modules.get("ray")  # where Ray runs this process it is imported already
    if ray is None or not ray.is_initialized():
        return
    from ray.util.metrics import Gauge

    for name, value in values.items():
        if name not in _gauges:
            _gauges[name] = Gauge(f"itpn_{name}", f"{name} of a run", tag_keys=tuple(tags))
        _gauges[name].set(float(value), dict(tags))


_gauges: dict[str, Any] = {}
