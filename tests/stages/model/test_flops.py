"""FLOPs from the config equal those that torch counts, and the figures published for L."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.model import Classifier, GatheringConfig, MigrationConfig, backbone_config
from stages.model.flops import backbone_flops

BOTH = {"migration": MigrationConfig(), "gathering": GatheringConfig(window=4, tokens=2)}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"family": "itpn"},
        {"migration": MigrationConfig()},
        {"gathering": GatheringConfig(window=4)},
        BOTH,
    ],
)
def test_flops_equal_what_torch_counts(more):
    config = backbone_config("fast_itpn_micro", **{"depths": (2, 1, 4), **more})
    model = Classifier(config, 7)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 3, 96, 128))
    assert counter.get_total_flops() == backbone_flops(config, 96, 128, num_classes=7).total


@pytest.mark.parametrize(
    ("size", "giga", "attention_percent"), [(224, 131, 4), (256, 174, 5), (512, 791, 16), (640, 1349, 23)]
)
def test_large_costs_what_is_known_of_it(size, giga, attention_percent):
    flops = backbone_flops(backbone_config("fast_itpn_large"), size, size, num_classes=1000)
    assert flops.total / 1e9 == pytest.approx(giga, rel=0.01)
    assert 100 * flops.attention / flops.total == pytest.approx(attention_percent, abs=0.6)


def test_savings_at_640_are_those_that_the_design_expects():
    def saved(**more):
        config = backbone_config("fast_itpn_large", **more)
        return (
            backbone_flops(backbone_config("fast_itpn_large"), 640, 640).total
            / backbone_flops(config, 640, 640).total
        )

    migration, gathering = MigrationConfig(keep=0.5), GatheringConfig(window=14, tokens=8)
    assert saved(migration=migration) == pytest.approx(1.57, abs=0.02)
    assert saved(gathering=gathering) == pytest.approx(1.26, abs=0.02)
    assert saved(migration=migration, gathering=gathering) == pytest.approx(1.85, abs=0.05)
