"""Masks hide exactly the number asked for, in blocks, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from stages.model import ObjectiveConfig, block_mask


@given(grid=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**63))
def test_every_mask_hides_exactly_the_number_asked_for(grid, share, seed):
    count = round(share * grid * grid)
    mask = block_mask(grid, count, (seed, 1))
    assert mask.shape == (grid * grid,) and mask.dtype == bool and mask.sum() == count


def test_equal_seeds_give_equal_masks_and_others_do_not():
    assert np.array_equal(block_mask(14, 75, (3, 1, 7)), block_mask(14, 75, (3, 1, 7)))
    different = {block_mask(14, 75, (3, 1, sample)).tobytes() for sample in range(50)}
    assert len(different) == 50


def test_a_mask_is_pinned_so_that_runs_can_be_resumed_by_later_versions():
    assert np.flatnonzero(block_mask(6, 9, (0, 1))).tolist() == [6, 7, 8, 12, 13, 14, 18, 19, 20]


def test_masks_are_blocks_and_reach_every_patch():
    masks = np.stack([block_mask(14, 75, (0, i)) for i in range(400)]).reshape(-1, 14, 14)
    same = (masks[:, :, 1:] == masks[:, :, :-1]).mean()
    assert same > 0.85  # independent patches would agree 0.53 of the time
    assert masks.any(0).all()


def test_counts_outside_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"not in 0\.\.36"):
        block_mask(6, 37, 0)
    with pytest.raises(ConfigError, match="hides every token"):
        ObjectiveConfig(num_masked=36).masked_tokens(6)
    with pytest.raises(ConfigError, match="no token is masked"):
        ObjectiveConfig(on="masked", mask_ratio=0).masked_tokens(6)
    assert (
        ObjectiveConfig().masked_tokens(14) == 78 and ObjectiveConfig(num_masked=75).masked_tokens(16) == 75
    )
