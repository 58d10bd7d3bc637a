"""What a step may ask of the machines."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.resources import Resources


@pytest.mark.parametrize(("workers", "gpus"), [(2, 0.5), (1, 1.5)])
def test_share_of_a_gpu_that_nobody_can_give_is_refused(workers: int, gpus: float) -> None:
    with pytest.raises(ConfigError, match="cannot be given"):
        Resources(workers=workers, gpus=gpus)


def test_one_worker_may_have_a_part_of_a_gpu_and_many_whole_ones() -> None:
    assert Resources(gpus=0.25).gpus + Resources(workers=8, gpus=2).gpus == 2.25
