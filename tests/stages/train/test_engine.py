"""What makes a step faster or smaller changes no loss: compilation, activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cluster import distributed
from cluster.errors import ConfigError
from stages.model import Classifier
from stages.model.config import BackboneConfig
from stages.train.config import EngineConfig, OptimiserConfig
from stages.train.engine import Engine, piece_size
from stages.train.optim import parameter_groups
from tests.stages.train.gradients import WHOLE, Coefficients

pytestmark = pytest.mark.timeout(400)

OPTIMISER = OptimiserConfig(lr=1e-3)


@pytest.fixture
def world() -> Iterator[distributed.World]:
    yield distributed.init(use_gpu=False)
    distributed.shutdown()


def classifier(**changes: object) -> Classifier:
    torch.manual_seed(0)
    config = BackboneConfig.parse(
        {"img_size": 32, "embed_dim": 32, "depths": (1, 1, 2), "num_heads": 2, **changes}
    )
    return Classifier(config, 5)


def train(module: nn.Module, config: EngineConfig, world: distributed.World) -> list[float]:
    """Losses of four steps."""
    engine = Engine.build(
        module,
        parameter_groups(module, OPTIMISER),
        config=config,
        optimiser=OPTIMISER,
        world=world,
        rank_batch=4,
    )
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32, generator=draw), torch.arange(4)
    losses = []
    try:
        for _ in range(4):
            loss = nn.functional.cross_entropy(engine.model(images).float(), labels)
            engine.backward(loss)
            assert engine.step(1e-3, skip=False).applied
            losses.append(loss.item())
    finally:
        engine.close()
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_compiled_run_agrees_with_eager(world: distributed.World, zero_stage: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = train(classifier(), EngineConfig(zero_stage=zero_stage), world)
    assert not torch._dynamo.utils.counters["stats"]
    compiled = train(classifier(), EngineConfig(zero_stage=zero_stage, compile=True), world)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    # Fused kernels add in another order.
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_activation_checkpointing_computes_blocks_again_and_changes_no_loss(world: distributed.World) -> None:
    calls: dict[bool, int] = {}

    def counted(checkpointing: bool) -> Classifier:
        model = classifier(activation_checkpointing=checkpointing)

        def count(*_: object) -> None:
            calls[checkpointing] = calls.get(checkpointing, 0) + 1

        for block in model.blocks:
            block.register_forward_pre_hook(count)
        return model

    losses = {on: train(counted(on), EngineConfig(zero_stage=1), world) for on in (False, True)}
    assert losses[True] == losses[False]
    assert calls[True] == 2 * calls[False]


def test_activation_checkpointing_keeps_less_for_the_backward_pass() -> None:
    def kept(checkpointing: bool) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            classifier(activation_checkpointing=checkpointing).train()(torch.randn(2, 3, 32, 32))
        return total

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize(
    ("samples", "most", "size"),
    [(64, 64, 64), (64, 48, 32), (32, 64, 32), (20, 5, 5), (20, 6, 4), (31, 16, 1), (1, 2, 1)],
)
def test_pieces_are_the_largest_equal_ones_within_the_limit_and_keep_pairs(
    samples: int, most: int, size: int
) -> None:
    assert piece_size(samples, most) == size


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_pieces_of_a_step_add_up_in_fp32(
    world: distributed.World,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    precision: str,
    micro_batch: int | None,
) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    module = Coefficients()
    config = EngineConfig.parse(
        {"zero_stage": stage, "precision": precision, "micro_batch": micro_batch, "clip_grad": 0.0}
    )
    engine = Engine.build(
        module,
        parameter_groups(module, OPTIMISER),
        config=config,
        optimiser=OPTIMISER,
        world=world,
        rank_batch=64,
    )
    try:
        # 3 is no divisor of 64: pieces of 2.
        assert engine.accumulation == {1: 64, 3: 32, None: 1}[micro_batch]
        if precision == "fp16":
            engine.model.optimizer.loss_scaler.cur_scale = 1.0
        # Whatever is added to 4096 one by one, or in twos, is lost in bf16 and fp16: both would end with 4096 / 64.
        coefficients = torch.tensor([4096.0] + [1.0] * 63).to(engine.dtype)
        for number, piece in enumerate(coefficients.chunk(engine.accumulation)):
            engine.backward(engine.model(piece))
            if number < engine.accumulation - 1:
                engine.micro_step_done()
        result = engine.step(1e-3, skip=False)
        # Rounded once to 16 bits, where ranks exchange gradients; without anything lost before.
        assert result.applied and result.grad_norm == pytest.approx((4096 + 63) / 64 * WHOLE**0.5, rel=2**-8)
    finally:
        engine.close()


def test_bf16_pieces_that_would_add_up_in_bf16_are_refused(world: distributed.World) -> None:
    with pytest.raises(ConfigError, match=r"engine\.zero_stage=1") as error:
        train(classifier(), EngineConfig(zero_stage=0, precision="bf16", micro_batch=2), world)
    assert error.value.found == "2 pieces"


def test_compilation_without_a_compiler_is_refused_with_a_remedy(
    world: distributed.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    with pytest.raises(ConfigError, match=r"engine\.compile=false"):
        train(classifier(), EngineConfig(compile=True), world)
