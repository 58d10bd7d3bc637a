"""Training on a Ray cluster of several nodes, of which one is drained, or vanishes: it goes on with fewer ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster.jobs import RayExecutor
from cluster.resources import Resources

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LOOP: dict[str, Any] = {
    "global_batch": 8,
    "schedule": {"steps": 200, "warmup_steps": 2},
    "optimiser": {"lr": 0.01},
    "checkpoint": {"save_every_steps": 20},
}


def rank(spec: dict) -> dict:
    """The toy run of tests/stages/train, as a rank of a group."""
    from cluster import distributed
    from tests.stages.train import toy

    return toy.train(spec, distributed.init(use_gpu=False))


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for workers, where this process is the driver, and two nodes for one rank each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def train_while(happens: Any, folder: Path) -> tuple[dict[str, Any], list[int]]:
    """Train elastically on one or two ranks; `happens` is called in step 50. Returns the result and rank 0's steps."""
    spec = {
        "loop": LOOP, "name": "run", "out": str(folder), "samples": str(folder / "samples"), "attempt": "a",
        "step_s": 0.1, "dropout": 0, "timeout_s": 60, "world_sizes": [1, 2],
    }  # fmt: skip
    log = folder / "samples-0"

    def watch() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) > 50:
                happens()
                return
            time.sleep(0.05)

    Thread(target=watch, daemon=True).start()
    result = RayExecutor(patience_s=3.0).workers(rank, spec, Resources(workers=2, min_workers=1))
    return result, [int(line.split()[0]) for line in log.read_text().splitlines()]


def batches(folder: Path) -> dict[int, int]:
    """The number of samples that rank 0 took in each step: it halves or doubles with the number of ranks."""
    lines = (folder / "samples-0").read_text().splitlines()
    return {int(line.split()[0]): len(json.loads(line.split(maxsplit=1)[1])) for line in lines}


def test_drained_node_is_left_after_a_save_and_no_step_is_lost(cluster, tmp_path):
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    nodes = cluster[1]

    def drain() -> None:
        accepted, why = GcsClient(address=cluster[0].address).drain_node(
            nodes[1].node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "a spot notice",
            int((time.time() + 120) * 1000),
        )
        assert accepted, why

    result, taken = train_while(drain, tmp_path)
    assert taken == list(range(200)), "every step once"
    sizes = batches(tmp_path)
    assert sizes[0] == 4 and sizes[199] == 8
    assert result["step"] == 200 and result["losses"][-1] < result["losses"][0]


def test_vanished_node_costs_an_interval_and_the_run_goes_on_without_it(cluster, tmp_path):
    result, taken = train_while(lambda: cluster[0].remove_node(cluster[1][1], allow_graceful=False), tmp_path)
    assert result["step"] == 200
    assert sorted(set(taken)) == list(range(200)) and len(taken) <= 200 + 2 * 20
    sizes = batches(tmp_path)
    assert sizes[0] == 4 and sizes[199] == 8
