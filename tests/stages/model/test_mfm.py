"""Masked feature modelling: what the student may see, which tokens count, which heads there are."""

import pytest
import torch
import torch.nn.functional as F

from stages.model import BackboneConfig, MaskedFeatureModel, ObjectiveConfig, build_backbone
from stages.model.layers import add_residual
from stages.model.mfm import feature_loss

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TARGET = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(2, 16, dtype=torch.bool)
MASK[:, [1, 5, 6, 9]] = True


def model(family="fast_itpn", objective=None, **more):
    torch.manual_seed(0)
    config = BackboneConfig(family=family, img_size=64, embed_dim=64, depths=(1, 1, 4), num_heads=2, **more)
    return MaskedFeatureModel(config, ObjectiveConfig(fpn_dim=32, **(objective or {})), 24)


def with_other_hidden_pixels():
    hidden = F.interpolate(MASK.view(2, 1, 4, 4).float(), scale_factor=16).bool()
    return torch.where(hidden, torch.randn(2, 3, 64, 64), IMAGE)


@torch.no_grad()
def test_hidden_pixels_reach_no_stage_of_fast_itpn():
    student = model()
    a, b = (student.backbone(x, MASK, student.mask_token) for x in (IMAGE, with_other_hidden_pixels()))
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = student.backbone(IMAGE)
    assert not torch.equal(plain["level4"], a["level4"])


@torch.no_grad()
def test_itpn_hides_after_stage_2():
    student = model("itpn")
    a, b = (student.backbone(x, MASK, student.mask_token) for x in (IMAGE, with_other_hidden_pixels()))
    assert torch.equal(a["tokens"], b["tokens"]) and not torch.equal(a["level8"], b["level8"])


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_only_hidden_tokens_count_when_asked(loss):
    objective = ObjectiveConfig(loss=loss, on="masked")
    x = torch.randn(2, 16, 24)
    found = feature_loss(x, TARGET, MASK, objective)
    x_other = torch.where(MASK.unsqueeze(-1), x, torch.randn(2, 16, 24))
    torch.testing.assert_close(feature_loss(x_other, TARGET, MASK, objective), found)
    if loss == "smooth_l1":
        expected = F.smooth_l1_loss(x[MASK], TARGET[MASK])
    else:
        expected = 1 - F.cosine_similarity(x[MASK], TARGET[MASK], dim=-1).mean()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(feature_loss(x, TARGET, MASK, ObjectiveConfig(loss=loss)), found)


@pytest.mark.parametrize(
    ("objective", "heads"),
    [
        ({}, {"pyramid", "auxiliary"}),
        ({"auxiliary": False}, {"pyramid"}),
        ({"levels": "per_level"}, {"level16", "level8", "level4", "auxiliary"}),
    ],
)
def test_every_head_has_a_loss_and_they_add_up(objective, heads):
    losses = model(objective=objective)(IMAGE, MASK, TARGET)
    total = losses.pop("loss")
    assert set(losses) == {f"loss_{name}" for name in heads}
    torch.testing.assert_close(total, sum(losses.values()))


def test_losses_are_fp32_for_a_bf16_model():
    student = model().to(torch.bfloat16)
    losses = student(IMAGE.to(torch.bfloat16), MASK, TARGET.to(torch.bfloat16))
    assert all(value.dtype == torch.float32 for value in losses.values())
    reference = model()(IMAGE, MASK, TARGET)["loss"]
    torch.testing.assert_close(losses["loss"], reference, rtol=0.02, atol=0.02)


def test_training_lowers_the_loss():
    student = model()
    optimiser = torch.optim.AdamW(student.parameters(), lr=2e-3)
    history = []
    for _ in range(25):
        loss = student(IMAGE, MASK, TARGET)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x, y = torch.zeros(4000, 2, 3), torch.ones(4000, 2, 3)
    out = add_residual(x, y, torch.full((3,), 2.0), drop_path=0.25, training=True)
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted({round(v, 4) for v in per_sample[:, 0].tolist()}) == [0, 2.6667]
    assert out.mean().item() == pytest.approx(2, rel=0.05)
    assert torch.equal(add_residual(x, y, None, drop_path=0.25, training=False), y)


def test_stop_grad_stem_keeps_values_and_takes_nine_tenths_of_the_gradient():
    config = BackboneConfig(img_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=2)
    plain = build_backbone(config)
    slow = build_backbone(config.model_copy(update={"stop_grad_stem": True}))
    slow.load_state_dict(plain.state_dict())
    outs = [m(IMAGE)["tokens"] for m in (plain, slow)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(slow.patch_embed.proj.weight.grad, plain.patch_embed.proj.weight.grad * 0.1)
    torch.testing.assert_close(slow.blocks[0].norm2.weight.grad, plain.blocks[0].norm2.weight.grad)
