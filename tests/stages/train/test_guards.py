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


def test_overflows_of_fp16_are_no_fault_until_they_do_not_end():
    guard = Guard(GuardConfig(max_overflows=2))
    found = [guard.judge_overflow(overflow, False) for overflow in (True, True, False, True, True, True)]
    assert found[:5] == [None] * 5 and "3 steps in a row" in str(found[5])


def test_overflow_at_the_lowest_loss_scale_is_a_fault_at_once():
    guard = Guard(GuardConfig(max_overflows=2))
    assert "lowest loss scale" in str(guard.judge_overflow(True, True))
    assert guard.judge_overflow(False, True) is None


def test_roll_back_takes_the_checkpoints_losses_and_goes_on_counting_roll_backs():
    guard = Guard(GuardConfig(max_bad_steps=2, max_rollbacks=2))
    guard.judge_step(1.5, None, step=1, has_checkpoint=True)
    guard.judge_step(1.5, "x", step=2, has_checkpoint=True)
    saved = guard.state()
    guard.judge_step(9.0, None, step=3, has_checkpoint=True)
    for step in (4, 5):
        verdict = guard.judge_step(1.0, "x", step=step, has_checkpoint=True)
    assert verdict == "roll back"
    guard.roll_back(saved)
    assert list(guard.recent) == [1.5] and guard.rollbacks == 1
    assert guard.judge_step(1.0, "x", step=6, has_checkpoint=True) == "bad"  # the row begins anew


def test_state_survives_a_checkpoint():
    guard, other = Guard(GuardConfig()), Guard(GuardConfig())
    guard.judge_step(1.5, None, step=1, has_checkpoint=True)
    guard.judge_step(1.5, "x", step=2, has_checkpoint=True)
    guard.judge_overflow(True, False)
    other.load(guard.state())
    assert other == guard
