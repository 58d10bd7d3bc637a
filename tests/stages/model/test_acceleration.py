"""Token migration and gathering: identities, positions, static shapes, errors."""

import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from stages.model import (
    BackboneConfig,
    Classifier,
    GatheringConfig,
    MaskedFeatureModel,
    MigrationConfig,
    ObjectiveConfig,
    backbone_config,
    build_backbone,
    windows,
)
from stages.model import acceleration as room
from stages.model.acceleration import (
    choose,
    coarse_rank,
    position_codes,
    redundancy,
    run_main_stage,
)
from stages.model.windows import WindowOrder, Windows, attend, window_order

FAMILIES = ["fast_itpn", "itpn"]


def config(family="fast_itpn", **more):
    return BackboneConfig(
        **({"family": family, "img_size": 96, "embed_dim": 64, "depths": (1, 1, 5), "num_heads": 4} | more)
    )


def pair(family, **more):
    """The plain backbone, and one with the same weights and other settings."""
    torch.manual_seed(0)
    plain = build_backbone(config(family)).eval()
    for name, value in plain.named_parameters():  # strong layer scale and biases, so that attention matters
        if "gamma" in name or "bias_table" in name:
            torch.nn.init.normal_(value, std=0.5)
    other = build_backbone(config(family, **more)).eval()
    other.load_state_dict(plain.state_dict(), strict=False)
    return plain, other


IMAGE = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more",
    [
        {"migration": MigrationConfig(keep=1, after_block=2)},
        {"gathering": GatheringConfig(window=6, tokens=0)},
        {"migration": MigrationConfig(keep=1), "gathering": GatheringConfig(window=6, tokens=0)},
        {"gathering": GatheringConfig(window=3, tokens=0, blocks=())},
    ],
    ids=["keep=1", "one full window", "both", "no windowed block"],
)
@torch.no_grad()
def test_neutral_settings_equal_the_baseline_exactly(family, more):
    plain, other = pair(family, **more)
    expected, found = plain(IMAGE), other(IMAGE)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gathering", [None, GatheringConfig(window=4, tokens=2)])
@pytest.mark.parametrize("score", ["similarity", "norm", "random"])
@torch.no_grad()
def test_migrated_tokens_stand_at_their_raster_positions_as_they_left(family, gathering, score):
    migration = MigrationConfig(after_block=2, keep=0.5, score=score)
    _, full = pair(family, gathering=gathering)
    _, model = pair(family, gathering=gathering, migration=migration)
    model.load_state_dict(full.state_dict())
    reference = full(IMAGE, tap=1)["tap"]  # after two blocks, raster order
    out = model(IMAGE)
    migrated = out["migrated"]
    assert torch.equal(out["tokens"][migrated], reference[migrated])
    assert not torch.isclose(out["tokens"][~migrated], reference[~migrated]).all(-1).any()
    assert migrated.sum(1).tolist() == [18, 18]  # half of 36, also of windows with 16, 8, 8 and 4
    assert torch.equal(out["level16"].flatten(2).transpose(1, 2), out["tokens"])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_kept_tokens_attend_among_themselves_only(family):
    """The stage after migration equals the same blocks run on the kept tokens alone."""
    _, model = pair(family, migration=MigrationConfig(after_block=2, keep=0.5))
    before = model(IMAGE, tap=1)["tap"]
    out = model(IMAGE)
    stay = (~out["migrated"]).nonzero()[:, 1].view(2, -1)
    x = before.gather(1, stay.unsqueeze(-1).expand(-1, -1, 64))
    codes = position_codes((6, 6), x.device).expand(2, -1).gather(1, stay)
    for block in model.blocks[-3:]:
        x = block(x) if family == "fast_itpn" else block(x, (6, 6), codes)
    expected = before.scatter(1, stay.unsqueeze(-1).expand(-1, -1, 64), x)
    torch.testing.assert_close(out["tokens"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((6, 6), 4), ((5, 7), 3), ((40, 40), 14)])
@pytest.mark.parametrize("biased", [False, True])
def test_windows_equal_masked_global_attention(grid, window, biased):
    """Ragged windows give what padding to equal windows and masking the padding would give."""
    order, groups = window_order(grid, window)
    N, G = grid[0] * grid[1], 3
    q, k, v = torch.randn(3, 2, N + G, 2, 8, dtype=torch.float64)
    table = torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1), 2, dtype=torch.float64)
    centre = (table.shape[0] - 1) // 2

    def bias(a, b):
        return table[a.unsqueeze(-1) - b.unsqueeze(-2) + centre].permute(0, 3, 1, 2)

    codes = position_codes(grid, q.device)[:, order] if biased else None
    found = attend(q, k, v, Windows(groups, G), codes, bias if biased else None)

    row, column = order // grid[1] // window, order % grid[1] // window
    home = torch.cat([row * 100 + column, torch.full((G,), -1)])
    seen = (home[:, None] == home[None]) | (home[:, None] < 0) | (home[None] < 0)
    mask = torch.zeros(1, 2, N + G, N + G, dtype=torch.float64)
    if biased:
        mask[:, :, :N, :N] = bias(codes, codes)
    mask = mask.masked_fill(~seen, -torch.inf)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2))
    assert sorted(order.tolist()) == list(range(N))


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_similarity_keeps_one_token_of_every_group_of_equals(keep):
    generator = torch.Generator().manual_seed(3)
    kinds = round(36 * keep)
    kind = torch.cat([torch.arange(kinds), torch.randint(kinds, (36 - kinds,), generator=generator)])
    kind = kind[torch.randperm(36, generator=generator)]
    x = torch.randn(kinds, 64, generator=generator)[kind].view(1, 1, 36, 64)
    rank = coarse_rank(position_codes((6, 6), x.device), (6, 6)).unsqueeze(1)
    stay = redundancy(x, rank, "similarity", False).topk(kinds, largest=False).indices.flatten()
    assert sorted(kind[stay].tolist()) == list(range(kinds))


def test_random_score_repeats_in_evaluation_and_varies_in_training():
    _, model = pair("fast_itpn", migration=MigrationConfig(score="random"))
    assert torch.equal(model(IMAGE)["migrated"], model(IMAGE)["migrated"])
    model.train()
    assert not torch.equal(model(IMAGE)["migrated"], model(IMAGE)["migrated"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_pretraining_with_both_gives_every_parameter_a_gradient(family, checkpointing):
    both = {"migration": MigrationConfig(keep=0.5), "gathering": GatheringConfig(window=4, tokens=2)}
    model = MaskedFeatureModel(
        config(family, drop_path=0.1, activation_checkpointing=checkpointing, **both),
        ObjectiveConfig(fpn_dim=32, levels="per_level"),
        24,
    ).train()
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, :14] = True
    losses = model(IMAGE, mask, torch.randn(2, 36, 24))
    assert set(losses) == {"loss", "loss_level16", "loss_level8", "loss_level4", "loss_auxiliary"}
    losses["loss"].backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


def test_classifier_runs_at_another_size_than_it_was_built_for():
    both = {"migration": MigrationConfig(), "gathering": GatheringConfig(window=4, tokens=2)}
    model = Classifier(config(**both), 5).eval()
    assert model(torch.randn(1, 3, 128, 160)).shape == (1, 5)
    with pytest.raises(ConfigError, match=r"gathering.window 4 is larger than the 3×8 grid"):
        model(torch.randn(1, 3, 48, 128))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"migration": {"keep": 0}}, "migration.keep"),
        ({"migration": {"keep": 1.5}}, "less than or equal to 1"),
        ({"migration": {"after_block": 6}}, "valid values are 1 to 5"),
        ({"migration": {}, "depths": (1, 1, 1)}, "at least 2 blocks; this one has 1"),
        ({"gathering": {"window": 7}}, "larger than the 6×6 grid.*valid values are 1 to 6"),
        ({"gathering": {"window": 3, "blocks": [5, 9]}}, "valid indices are 0 to 5"),
        ({"migration": {"score": "best"}}, "'similarity', 'norm' or 'random'"),
        ({"gathering": {"windows": 3}}, "did you mean 'window'"),
    ],
)
def test_settings_that_cannot_work_say_what_would(settings, words):
    with pytest.raises(ConfigError, match=words):
        backbone_config("fast_itpn_micro", **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gathering", [None, GatheringConfig(window=4, tokens=2)])
@pytest.mark.parametrize("migration", [None, MigrationConfig(after_block=2, keep=0.5)])
@torch.no_grad()
def test_bf16_stays_near_fp32(family, gathering, migration, monkeypatch):
    """Stated bounds: a relative error of 2 % of the tokens' norm where the same tokens migrate, and 9 of 10 do."""
    _, model = pair(family, gathering=gathering, migration=migration)
    chosen = []
    with monkeypatch.context() as patch:
        patch.setattr(room, "choose", lambda *a, **k: chosen.append(choose(*a, **k)) or chosen[-1])
        expected = model(IMAGE)
    model.to(torch.bfloat16)
    if migration is not None:
        own = model(IMAGE.to(torch.bfloat16))["migrated"]
        agreement = (own == expected["migrated"]).float().mean().item()
        assert agreement >= 0.9, f"{agreement:.3f}"
        monkeypatch.setattr(room, "choose", lambda *a, **k: chosen[-1])
    found = model(IMAGE.to(torch.bfloat16))["tokens"].float()
    error = ((found - expected["tokens"]).norm() / expected["tokens"].norm()).item()
    assert error < 0.02, f"{error:.4f}"


def test_similarity_is_scored_in_fp32_under_autocast():
    x = torch.randn(1, 1, 36, 64, generator=torch.Generator().manual_seed(0)) + 8
    rank = coarse_rank(position_codes((6, 6), x.device), (6, 6)).unsqueeze(1)
    expected = redundancy(x, rank, "similarity", False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(redundancy(x, rank, "similarity", False), expected)
    half = x.to(torch.bfloat16)
    assert torch.equal(
        redundancy(half, rank, "similarity", False), redundancy(half.float(), rank, "similarity", False)
    )


def test_random_choice_is_made_of_integers_and_spread_over_the_image():
    x = torch.zeros(1, 1, 1600, 8)
    rank = coarse_rank(position_codes((40, 40), x.device), (40, 40)).unsqueeze(1)
    score = redundancy(x, rank, "random", False)
    assert score.dtype == torch.int64 and score.unique().numel() == 1600 and score.min() >= 0
    stay = score.topk(800, largest=False).indices.flatten()
    quarters = torch.bincount((stay // 40 // 20) * 2 + stay % 40 // 20)
    assert quarters.min() > 160  # 200 of 400 expected, standard deviation 7


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_pretraining_with_both_equals_eager(backend):
    both = {"migration": MigrationConfig(after_block=1), "gathering": GatheringConfig(window=4, tokens=2)}
    torch.manual_seed(0)
    model = MaskedFeatureModel(config(depths=(1, 1, 2), **both), ObjectiveConfig(fpn_dim=32), 24)
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, ::3] = True
    target = torch.randn(2, 36, 24)
    expected, found = model(IMAGE, mask, target), torch.compile(model, backend=backend)(IMAGE, mask, target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(out["loss"], parameters) for out in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.timeout(900)  # the first inductor run builds its kernels
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend):
    both = {"migration": MigrationConfig(), "gathering": GatheringConfig(window=4, tokens=2)}
    model = Classifier(config(depths=(1, 1, 2), **both), 5, head_init_scale=1.0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected, found = model(IMAGE), compiled(IMAGE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_the_order_of_windows_is_kept_with_the_model_and_not_with_its_weights(monkeypatch):
    _, model = pair("fast_itpn", gathering=GatheringConfig(window=4, tokens=2))
    expected, other = model(IMAGE)["tokens"], model(IMAGE[..., :80])["tokens"]
    assert not any("window_order" in name for name in model.state_dict())
    monkeypatch.setattr(windows, "window_order", lambda *a: pytest.fail("made in the forward pass"))
    assert torch.equal(model(IMAGE)["tokens"], expected)
    monkeypatch.undo()
    assert torch.equal(model(IMAGE[..., :80])["tokens"], other)  # another grid
    assert model.to("meta").window_order.order.device.type == "meta"


def test_main_stage_needs_no_image():
    """`run_main_stage` is a plain function of tokens: what the blocks get has static shapes."""
    lengths = []

    def call(block, x, windows, codes):
        lengths.append((x.shape[1], windows.groups if windows else None, codes.shape[1]))
        return x

    settings = config(migration=MigrationConfig(after_block=2), gathering=GatheringConfig(window=4, tokens=2))
    embed = torch.zeros(1, 2, 64)
    order = WindowOrder((6, 6), 4)
    run_main_stage(torch.randn(1, 36, 64), [None] * 4, (6, 6), settings, embed, order, call, None, False)
    whole, half = ((1, 16), (2, 8), (1, 4)), ((1, 8), (2, 4), (1, 2))
    assert lengths == [(38, whole, 36)] * 2 + [(20, half, 18)] * 2
