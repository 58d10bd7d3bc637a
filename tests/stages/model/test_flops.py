"""FLOPs from the config equal those that torch counts, and the figures published for L."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.model import (
    Classifier,
    GatheringConfig,
    MaskedFeatureModel,
    MigrationConfig,
    ObjectiveConfig,
    TeacherConfig,
    backbone_config,
    load_teacher,
)
from stages.model.flops import backbone_flops, pretrain_flops, teacher_flops
from tests.stages.model.test_teacher import small

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


@pytest.mark.parametrize(
    ("backbone", "objective"),
    [
        ({}, {}),
        ({"family": "itpn"}, {"levels": "per_level"}),
        ({"embed_dim": 64}, {"fpn_dim": 64, "fpn_depth": 2, "auxiliary": False}),
    ],
)
def test_flops_of_masked_feature_modelling_equal_what_torch_counts(backbone, objective):
    config = backbone_config("fast_itpn_micro", **{"depths": (2, 1, 4), **backbone})
    objective = ObjectiveConfig(**{"fpn_dim": 32, **objective})
    model = MaskedFeatureModel(config, objective, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.predict(torch.zeros(1, 3, 96, 96), torch.zeros(1, 36, dtype=torch.bool))
    assert counter.get_total_flops() == pretrain_flops(config, objective, 24)


@pytest.mark.parametrize("kind", ["clip-micro", "siglip", "dinov2"])
def test_flops_of_a_teacher_equal_what_torch_counts_on_an_image(tmp_path, kind):
    if kind == "clip-micro":
        uri = Path(__file__).parents[3] / "assets" / "clip-micro"
    else:
        uri = tmp_path
        small(kind).save_pretrained(uri)
    teacher = load_teacher(TeacherConfig(uri=str(uri)))
    image = torch.zeros(1, 3, teacher.input_size, teacher.input_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher(image)
    assert counter.get_total_flops() == teacher_flops(teacher) > 1e5
    assert next(teacher.tower.parameters()).device.type == "cpu"
