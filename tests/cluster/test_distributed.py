"""Processes alone leave nothing behind that another group could stumble over."""

from __future__ import annotations

import os

from cluster import distributed


def test_port_of_a_process_alone_is_forgotten(monkeypatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert distributed.init(use_gpu=False).world_size == 1 and os.environ["MASTER_PORT"]
    distributed.shutdown()
    assert "MASTER_PORT" not in os.environ


def test_port_that_was_given_stays(monkeypatch) -> None:
    given = str(distributed.free_port())
    monkeypatch.setenv("MASTER_PORT", given)
    distributed.init(use_gpu=False)
    distributed.shutdown()
    assert os.environ["MASTER_PORT"] == given
