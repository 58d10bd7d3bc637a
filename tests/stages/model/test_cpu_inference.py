"""CPU inference computes in pieces and through oneDNN what the plain operations compute, and only there."""

import pytest
import torch
import torch.nn.functional as F

from stages.model import (
    BackboneConfig,
    Classifier,
    GatheringConfig,
    MaskedFeatureModel,
    MigrationConfig,
    ObjectiveConfig,
)
from stages.model import cpu_inference as room

BOTH = {"migration": MigrationConfig(after_block=1), "gathering": GatheringConfig(window=4, tokens=2)}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(room, "PIECE", 500)
    monkeypatch.setattr(room, "SMALL", 0)


@pytest.mark.parametrize("shape", [(5, 7, 12), (1, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_linear(small_pieces, monkeypatch, shape, bias):
    x, weight = torch.randn(shape), torch.randn(20, 12)
    b = torch.randn(20) if bias else None
    expected = F.linear(x, weight, b)
    monkeypatch.setattr(F, "linear", lambda *_: pytest.fail("not given to oneDNN"))
    with torch.no_grad():
        found = room.product(x, weight, b)
    torch.testing.assert_close(found, expected)
    assert found.shape == expected.shape and found.is_contiguous()


def test_pieces_are_small_and_cover_every_item_once(small_pieces):
    seen = []

    def double(x):
        seen.append(x.shape[0])
        return 2 * x[..., :3]

    x = torch.randn(7, 11, 6)
    threads = torch.get_num_threads()
    with torch.no_grad():
        found = room.in_pieces(double, x, dims=1, floats=100 * threads)
        assert torch.equal(found, 2 * x[..., :3]) and seen == [5] * 15 + [2]
        assert torch.equal(room.in_pieces(double, x, dims=2, floats=10**9), 2 * x[..., :3])
    assert seen[16:] == [1] * 7


@pytest.mark.parametrize("family", ["fast_itpn", "itpn"])
@pytest.mark.parametrize("more", [{}, BOTH], ids=["dense", "accelerated"])
def test_a_model_gives_with_and_without_gradients_the_same(small_pieces, family, more):
    torch.manual_seed(0)
    config = BackboneConfig(
        family=family, img_size=96, embed_dim=64, depths=(1, 1, 3), num_heads=4, init_values=1.0, **more
    )
    image = torch.randn(3, 3, 96, 96)
    for model in (Classifier(config, 5), MaskedFeatureModel(config, ObjectiveConfig(fpn_dim=32), 24)):
        model.eval()
        expected = model.forward_features(image)
        with torch.no_grad():
            found = model.forward_features(image)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_training_gradients_compilation_and_half_precision_are_left_as_they_are():
    x = torch.randn(4, 8)
    assert not room.plain_cpu(x)  # gradients are on
    with torch.no_grad():
        assert room.plain_cpu(x)
        assert not room.plain_cpu(x.bfloat16()) and not room.plain_cpu(x.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not room.plain_cpu(x)
        compiled = torch.compile(lambda t: t + room.plain_cpu(t), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), x)
    torch._dynamo.reset()


def test_drop_path_draws_once_for_each_sample_without_gradients_too(small_pieces):
    torch.manual_seed(0)
    config = BackboneConfig(img_size=64, embed_dim=64, depths=(1, 1, 3), num_heads=4, drop_path=0.9)
    model = Classifier(config, 5).train()
    image = torch.randn(3, 3, 64, 64)
    torch.manual_seed(1)
    expected = model.forward_features(image)["tokens"].detach()
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(image)["tokens"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_inference_equals_eager():
    config = BackboneConfig(img_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=4, **BOTH)
    model = Classifier(config, 5, head_init_scale=1.0).eval()
    image = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
