"""Schedule and parameter groups against recorded reference values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigError
from stages.model import Classifier, backbone_config, layer_id, num_layers
from stages.train.config import OptimiserConfig, ScheduleConfig
from stages.train.optim import GuardedAdamW, parameter_groups
from stages.train.schedule import make_schedule

DATA = Path(__file__).with_name("data")
PARITY = Path(__file__).parents[2] / "parity" / "data"


def test_schedule_equals_the_published_one_at_every_step():
    golden = json.loads((DATA / "lr_schedule.json").read_text())
    config = ScheduleConfig(
        epochs=golden["epochs"], warmup_epochs=golden["warmup_epochs"], min_lr=golden["final"]
    )
    schedule = make_schedule(config, golden["base"], golden["steps_per_epoch"])
    assert [schedule.lr(step) for step in range(schedule.total_steps)] == pytest.approx(
        golden["values"], rel=1e-12, abs=1e-18
    )


def test_schedule_without_a_step_is_refused():
    with pytest.raises(ConfigError, match="no step"):
        make_schedule(ScheduleConfig(epochs=1, warmup_epochs=2), 1e-3, 10)
    with pytest.raises(ValueError, match="exactly one"):
        ScheduleConfig(epochs=1, steps=5)


@pytest.mark.parametrize(
    ("size", "golden", "decay"),
    [
        ("fast_itpn_tiny", "fast_itpn_tiny_1112_patch16_224", 0.8),
        ("fast_itpn_large", "fast_itpn_large_2240_patch16_256", 0.95),
    ],
)
def test_layer_decay_and_weight_decay_of_every_parameter_equal_the_published_ones(size, golden, decay):
    expected = json.loads((PARITY / "layer_decay.json").read_text())[golden]["params"]
    with torch.device("meta"):
        model = Classifier(backbone_config(size), 1000)
    depths = backbone_config(size).depths
    groups = parameter_groups(
        model,
        OptimiserConfig(layer_decay=decay, weight_decay=0.05),
        layer_of=lambda name: layer_id(name, depths),
        layers=num_layers(depths),
    )
    found = {
        name: {"lr_scale": group["lr_scale"], "weight_decay": group["weight_decay"] > 0}
        for group in groups
        for name in group["names"]
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name]["weight_decay"] == value["weight_decay"], name
        assert found[name]["lr_scale"] == pytest.approx(value["lr_scale"], rel=1e-9), name


def test_held_back_optimiser_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = GuardedAdamW([{"params": [parameter], "lr_scale": 1.0}], OptimiserConfig(lr=0.1))
    optimiser.ensure_state([parameter])
    parameter.grad = torch.full((3,), float("nan"))
    optimiser.skip = True
    optimiser.step()
    assert parameter.tolist() == [1, 1, 1] and optimiser.state[parameter]["step"] == 0
