"""The benchmark's measuring stick computes what our model computes, and every variant is measured alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.model import backbone_config, build_backbone

BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import model

    yield model
    for name in ("model", "naive_model"):
        sys.modules.pop(name, None)


@torch.no_grad()
def test_the_naive_model_equals_ours(bench):
    ours = build_backbone(backbone_config("fast_itpn_micro")).eval()
    for (
        name,
        parameter,
    ) in ours.named_parameters():  # strong layer scale and biases, so that attention matters
        if "gamma" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    image = torch.randn(2, 3, 128, 96)
    torch.testing.assert_close(bench.NaiveFastITPN(ours)(image), ours(image)["tokens"], rtol=1e-4, atol=1e-4)


def test_the_memory_of_one_variant_does_not_count_against_the_next(bench):
    found = bench.measure(
        backbone_config("fast_itpn_micro"),
        384,
        train=True,
        names=("naive", "dense"),
        batch=4,
        rounds=1,
        device=torch.device("cpu"),
        clock="wall",
    )
    # The naive attention keeps matrices of 576 × 576 for 16 heads in 6 blocks: 21 MB each.
    assert found["naive"]["peak_mib"] > found["dense"]["peak_mib"] + 100


def test_it_prints_a_figure_of_every_variant_as_its_last_line():
    command = [sys.executable, str(BENCH / "model.py"), "--size", "fast_itpn_micro", "--pixels", "64"]
    done = subprocess.run(
        [*command, "--no-large", "--rounds", "2", "--batch", "1", "--threads", "1", "--device", "cpu"],
        cwd=BENCH.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    for name in ("naive", "dense", "migration", "gathering", "both"):
        assert figures[f"img_s_{name}_64"] > 0 and figures[f"img_s_{name}_64_train"] > 0
    assert {"dense_over_naive_64", "accelerated_over_dense_64_train", "device"} <= set(figures)
