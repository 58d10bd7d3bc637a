"""What only a GPU can show: its numbers are the CPU's, compiled bf16 steps train, the benchmark measures there."""

import sys
from pathlib import Path

import pytest
import torch

from stages.model import (
    BackboneConfig,
    GatheringConfig,
    MaskedFeatureModel,
    MigrationConfig,
    ObjectiveConfig,
    TeacherConfig,
    load_teacher,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(900),  # inductor and triton build their kernels
]
DEVICE = "cuda"
BOTH = {"migration": MigrationConfig(after_block=2), "gathering": GatheringConfig(window=4, tokens=2)}
REPOSITORY = Path(__file__).parents[3]


def made(family, **more):
    torch.manual_seed(0)
    config = BackboneConfig(family=family, img_size=96, embed_dim=64, depths=(1, 1, 5), num_heads=4, **more)
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, ::3] = True
    model = MaskedFeatureModel(config, ObjectiveConfig(fpn_dim=32), 24)
    return model, (torch.randn(2, 3, 96, 96), mask, torch.randn(2, 36, 24))


@pytest.mark.parametrize("family", ["fast_itpn", "itpn"])
@pytest.mark.parametrize("more", [{}, BOTH], ids=["dense", "accelerated"])
def test_a_gpu_gives_the_losses_and_gradients_of_a_cpu(family, more):
    model, batch = made(family, **more)
    found = {}
    for device in ("cpu", DEVICE):
        model.zero_grad(set_to_none=True)
        losses = model.to(device)(*(x.to(device) for x in batch))
        losses["loss"].backward()
        gradients = {f"gradient of {n}": p.grad.cpu() for n, p in model.named_parameters()}
        found[device] = {n: loss.detach().cpu() for n, loss in losses.items()} | gradients
    for name, value in found["cpu"].items():
        torch.testing.assert_close(
            found[DEVICE][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", ["fast_itpn", "itpn"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_compiled_bf16_steps_with_both_accelerations_lower_the_loss(family, autocast):
    model, batch = made(family, **BOTH)
    image, mask, target = (x.to(DEVICE) for x in batch)
    model.to(DEVICE, torch.float32 if autocast else torch.bfloat16)
    step = torch.compile(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = step(image if autocast else image.bfloat16(), mask, target)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    assert losses.dtype == torch.float32 and losses.isfinite().all() and losses[-1] < 0.95 * losses[0]
    torch._dynamo.reset()


def test_the_bundled_teacher_gives_in_bf16_nearly_its_targets_in_fp32():
    uri, image = str(REPOSITORY / "assets" / "clip-micro"), torch.rand(2, 3, 96, 96)
    expected = load_teacher(TeacherConfig(uri=uri))(image)
    teacher = load_teacher(TeacherConfig(uri=uri), DEVICE)
    target = teacher(image.to(DEVICE))
    assert teacher.dtype == torch.bfloat16 and target.dtype == torch.float32 and target.device.type == DEVICE
    assert (target.cpu() - expected).abs().mean() < 0.05


def test_the_benchmark_measures_every_variant(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    import model as bench

    config = bench.backbone_config("fast_itpn_micro")
    for train in (False, True):
        common = {"batch": 2, "rounds": 2, "device": torch.device(DEVICE), "clock": "wall"}
        rows = bench.measure(config, 128, train=train, names=bench.VARIANTS, **common)
        assert list(rows) == list(bench.VARIANTS)
        assert all(row["s"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    for name in ("model", "naive_model"):
        sys.modules.pop(name, None)
