"""What becomes of gradients on two real processes: who keeps them, and in which precision their pieces add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stages.train import ranks
from tests.stages.train.gradients import WHOLE, WIDTH

pytestmark = pytest.mark.timeout(300)

# Whatever is added to these one by one is lost in bf16, whose next number after 4096 is 4128.
COEFFICIENTS = [[4096.0] + [1.0] * 63, [2048.0] + [1.0] * 63]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, then by case."""
    root = tmp_path_factory.mktemp("gradients")
    cases: dict[str, dict[str, Any]] = {
        f"fp32 zero{z}": {"zero_stage": z, "micro_batch": 32} for z in range(4)
    }
    cases |= {f"bf16 zero{z}": {"zero_stage": z, "precision": "bf16", "micro_batch": 1} for z in (1, 2, 3)}
    spec = {"result": str(root / "result"), "cases": cases, "coefficients": COEFFICIENTS}
    script = Path(__file__).with_name("gradients.py")
    assert ranks.run(2, spec, root / "processes", script=script) == [0, 0], ranks.errors(root / "processes")
    return ranks.results(root / "result", 2)


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_keeps_all_gradients_up_to_stage_1_and_its_part_from_stage_2_on(
    found: list[dict[str, Any]], stage: int
) -> None:
    for rank in found:
        held = rank[f"fp32 zero{stage}"]["held"]
        assert held == WHOLE if stage < 2 else WHOLE / 2 <= held <= WHOLE / 2 + WIDTH


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pieces_of_a_bf16_step_add_up_in_fp32_on_every_rank(found: list[dict[str, Any]], stage: int) -> None:
    mean = sum(map(sum, COEFFICIENTS)) / 128  # 49.0; added up in bf16 it would be 48
    for rank in found:
        result = rank[f"bf16 zero{stage}"]
        assert result["pieces"] == 64
        # The sum over the ranks may be rounded once to 16 bits, where they exchange gradients.
        assert result["norm"] == pytest.approx(mean * WHOLE**0.5, rel=2**-8)
