"""Which numbers of ranks can share a run's data and batch."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.resources import Resources
from stages.train.config import EngineConfig, LoopConfig, ScheduleConfig
from stages.train.launch import world_sizes


def loop(batch: int, **engine: Any) -> LoopConfig:
    return LoopConfig(schedule=ScheduleConfig(steps=1), global_batch=batch, engine=EngineConfig(**engine))


def test_every_divisor_of_streams_and_batch_will_do_whatever_the_micro_batch() -> None:
    elastic = Resources(workers=64, min_workers=3)
    assert world_sizes(elastic, loop(2048, micro_batch=48), streams=64) == [4, 8, 16, 32, 64]
    assert world_sizes(Resources(workers=8, min_workers=1), loop(12), streams=6) == [1, 2, 3, 6]


def test_elastic_group_does_not_shrink_to_what_the_engine_refuses() -> None:
    elastic = Resources(workers=8, min_workers=1)
    engine = {"precision": "bf16", "zero_stage": 0, "micro_batch": 16}
    assert world_sizes(elastic, loop(64, **engine), streams=8) == [4, 8]
    assert world_sizes(elastic, loop(64, **engine | {"zero_stage": 1}), streams=8) == [1, 2, 4, 8]


def test_fixed_number_of_ranks_that_fits_is_taken() -> None:
    assert world_sizes(Resources(workers=16), loop(2048), streams=64) == [16]


@pytest.mark.parametrize(
    ("resources", "nearest"),
    [
        (Resources(workers=12), "8 or 16"),
        (Resources(workers=100), "64;"),
        (Resources(workers=31, min_workers=17), "16 or 32"),
    ],
)
def test_others_are_refused_with_the_nearest_that_fit(resources: Resources, nearest: str) -> None:
    with pytest.raises(ConfigError, match="cannot share the work evenly") as error:
        world_sizes(resources, loop(2048), streams=64)
    assert nearest in str(error.value.remedy)
