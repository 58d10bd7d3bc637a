"""The guard's bookkeeping."""

from __future__ import annotations

import pytest

from cluster.errors import TrainingDiverged
from stages.train.config import GuardConfig
from stages.train.guards import Guard


def test_good_steps_reset_the_count_of_bad_ones():
    guard = Guard(GuardConfig(max_bad_steps=3, max_rollbacks=1))
    for reason in ("x", "x", None, "x", "x"):
        assert guard.judge_step(1.0, reason, step=1, has_checkpoint=True) == ("bad" if reason else "good")
    assert guard.judge_step(1.0, "x", step=1, has_checkpoint=True) == "roll back"


def test_limit_of_roll_backs_ends_the_run_with_code_6():
    guard = Guard(GuardConfig(max_bad_steps=1, max_rollbacks=2))
    assert guard.judge_step(1.0, "x", step=5, has_checkpoint=True) == "roll back"
    assert guard.judge_step(1.0, "x", step=6, has_checkpoint=True) == "roll back"
    with pytest.raises(TrainingDiverged, match="step 7") as error:
        guard.judge_step(1.0, "x", step=7, has_checkpoint=True)
    assert error.value.exit_code == 6


def test_without_a_checkpoint_there_is_nothing_to_go_back_to():
    guard = Guard(GuardConfig(max_bad_steps=1, max_rollbacks=2))
    with pytest.raises(TrainingDiverged, match="no checkpoint"):
        guard.judge_step(1.0, "x", step=1, has_checkpoint=False)


def test_spike_is_judged_against_the_recent_median_only_when_enough_is_known():
    guard = Guard(GuardConfig(spike_factor=3, spike_window=5))
    assert guard.judge_loss(100.0, 0) is None
    for loss in (1.0, 1.1, 0.9, 1.0, 1.0):
        guard.judge_step(loss, None, step=1, has_checkpoint=True)
    assert guard.judge_loss(2.9, 0) is None
    assert "over 3 x" in str(guard.judge_loss(3.1, 0))
    assert "not finite on 2" in str(guard.judge_loss(1.0, 2))


def test_state_survives_a_checkpoint():
    guard, other = Guard(GuardConfig()), Guard(GuardConfig())
    guard.judge_step(1.5, None, step=1, has_checkpoint=True)
    guard.judge_step(1.5, "x", step=2, has_checkpoint=True)
    other.load(guard.state())
    assert other == guard
