"""Gradients under each ZeRO stage, as a script: `python gradients.py SPEC.json`, one process per rank.

For every case of the spec: how much of the gradients this rank holds between the pieces of a step, and their norm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import distributed
from stages.train.config import EngineConfig, OptimiserConfig
from stages.train.engine import Engine
from stages.train.optim import parameter_groups

LAYERS, WIDTH = 16, 40
WHOLE = LAYERS * WIDTH


class Coefficients(nn.Module):
    """The gradient of every weight is the mean of the coefficients given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(WIDTH) for _ in range(LAYERS)])

    def forward(self, coefficients_B: Tensor) -> Tensor:
        return sum((coefficients_B[:, None] * weight).sum(1).mean() for weight in self.weights)


def held(engine: Engine) -> int:
    """Elements of the memory in which this rank keeps gradients, whole tensors where it keeps a part of one."""
    zero = engine.model.optimizer
    stage3 = getattr(zero, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {})
    kept = [p.grad for p in engine.module.parameters()]
    kept += [getattr(p, "grad_accum", None) for p in engine.module.parameters()]
    for name in ("averaged_gradients", "all_grad_tensors"):  # of stages 1 and 2
        kept += _tensors(getattr(zero, name, {}))
    kept += stage3.values()
    memory = {t.untyped_storage().data_ptr(): t for t in kept if t is not None and t.numel()}
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in memory.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def one(case: dict[str, Any], coefficients: list[float], world: distributed.World) -> dict[str, Any]:
    """One step on this rank's `coefficients`."""
    module, optimiser = Coefficients(), OptimiserConfig(lr=1e-3)
    config = EngineConfig.parse({"clip_grad": 0.0, "zero3_persist_numel": 0, **case})
    engine = Engine.build(
        module,
        parameter_groups(module, optimiser),
        config=config,
        optimiser=optimiser,
        world=world,
        rank_batch=len(coefficients),
    )
    try:
        pieces = torch.tensor(coefficients, dtype=engine.dtype).chunk(engine.accumulation)
        for number, piece in enumerate(pieces):
            engine.backward(engine.model(piece))
            if number < engine.accumulation - 1:
                engine.micro_step_done()
                kept = held(engine)  # after the last one stage 1 drops what other ranks will apply
        result = engine.step(1e-3, skip=False)
        return {"held": kept, "norm": result.grad_norm, "pieces": engine.accumulation}
    finally:
        engine.close()


def main() -> int:
    """Run all cases; the results go to the file that the spec names."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    world = distributed.init(timeout_s=60, use_gpu=False)
    try:
        found = {
            name: one(case, spec["coefficients"][world.rank], world) for name, case in spec["cases"].items()
        }
        Path(f"{spec['result']}.{world.rank}").write_text(json.dumps(found))
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    distributed.leave(main())
