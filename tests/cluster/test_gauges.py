"""Gauges reach the endpoint that Prometheus scrapes, on a real local Ray."""

from __future__ import annotations

import time
import urllib.request
from contextlib import suppress

import pytest

from cluster.jobs import Session, publish_gauges
from cluster.resources import Resources

pytestmark = pytest.mark.timeout(300)


def publish() -> list[str]:
    """Set two gauges until both are at the endpoint; returns its lines of ours."""
    deadline = time.monotonic() + 120
    lines: list[str] = []
    while time.monotonic() < deadline and len(lines) < 2:
        publish_gauges({"train_loss": 0.25, "train_mfu": 0.5}, {"run": "pretrain/toy/v1"})
        time.sleep(0.5)
        with suppress(OSError):  # its agent may not be up yet
            lines = exported()
    return lines


def exported() -> list[str]:
    """The lines of ours at the metrics endpoint of this node."""
    import ray

    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return [line for line in lines if line.startswith("ray_itpn_")]


def test_gauge_is_at_the_endpoint_that_prometheus_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    session = Session()
    try:
        lines = session.submit(publish, resources=Resources(), name="publish").result()
    finally:
        session.close()
    [loss] = [line for line in lines if line.startswith("ray_itpn_train_loss{")]
    assert 'run="pretrain/toy/v1"' in loss and loss.endswith(" 0.25")
    assert any(line.startswith("ray_itpn_train_mfu{") and line.endswith(" 0.5") for line in lines)


def test_outside_ray_nothing_happens() -> None:
    publish_gauges({"train_loss": 1.0}, {"run": "x"})
