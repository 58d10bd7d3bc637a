"""Parameter groups with weight decay and layer decay, and the AdamW that a guard can hold back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stages.model.layer_decay import decays
from stages.train.config import OptimiserConfig


def parameter_groups(
    model: nn.Module,
    config: OptimiserConfig,
    *,
    layer_of: Callable[[str], int] | None = None,
    layers: int = 0,
) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters, one for each pair of lr scale and weight decay.

    Args:
        model: its parameter names go to `layer_of`.
        config: learning rate, weight decay, layer decay.
        layer_of: layer of a parameter by name: 0 for the embeddings, i + 1 for block i, `layers` + 1 for the head.
        layers: number of blocks.

    Each group has `lr_scale` = layer_decay ** (layers + 1 - layer), by which the loop multiplies the schedule's
    lr, and `names`. The order is that of first appearance, so that it is the same on every rank.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if layer_of is not None and config.layer_decay < 1.0:
            scale = config.layer_decay ** (layers + 1 - layer_of(name))
        decay = decays(name, parameter.ndim)
        group = groups.setdefault(
            (scale, decay),
            {
                "params": [],
                "names": [],
                "lr_scale": scale,
                "lr": config.lr * scale,
                "weight_decay": config.weight_decay if decay else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW whose `step` does nothing while `skip` is set.

    DeepSpeed calls `step` from inside its own, after reducing, clipping and casting; holding back here keeps
    all of its bookkeeping in order and leaves weights and moments untouched, bit for bit.
    """

    skip = False

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimiserConfig) -> None:
        super().__init__(
            list(groups),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)

    def ensure_state(self, parameters: Iterable[Tensor]) -> None:
        """Make the moments of `parameters` now (zeros) instead of at the first step, so that they can be loaded."""
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
