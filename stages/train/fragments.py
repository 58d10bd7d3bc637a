"""The state of a run as *fragments*: pieces of named parameters, each a 1-D view into whatever flat buffer the ZeRO
stage keeps on this rank. Checkpoints are made of fragments, so they do not depend on the world size or on the stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cluster.distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """A contiguous piece of one flattened parameter that lives on this rank.

    `tensors` holds fp32 1-D live views of equal length: `master`, `exp_avg`, `exp_avg_sq` and, with EMA, `ema`.
    `saved_here` is false where another rank writes the same piece (ZeRO-0 keeps everything everywhere).
    """

    name: str
    offset: int
    numel: int
    tensors: dict[str, Tensor]
    saved_here: bool = True
    filled: dict[str, int] = field(default_factory=dict)  # elements read so far, while a checkpoint is loaded


def flat_masters(zero: Any, optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The fp32 tensors that AdamW steps on: flat buffers of many parameters each, or the parameters themselves.

    `zero` is DeepSpeed's wrapper of `optimiser`, or `optimiser` itself where it needs none.
    """
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    if hasattr(zero, "fp32_groups"):
        return [p for group in zero.fp32_groups for p in group]
    return [p for group in optimiser.param_groups for p in group["params"]]


def find_fragments(
    zero: Any,
    optimiser: torch.optim.Optimizer,
    module: nn.Module,
    names: dict[int, str],
    *,
    stage: int,
    world: World,
) -> Iterator[Fragment]:
    """This rank's fragments of the trainable parameters of `module`, whose moments exist already.

    `names` maps `id(parameter)` to its name; `zero` is as in `flat_masters`.
    """

    def fragment(name: str, offset: int, numel: int, flat: Tensor, start: int) -> Fragment:
        state = optimiser.state[flat]
        sources = {"master": flat.detach(), **{key: state[key] for key in MOMENTS}}
        views = {key: value.view(-1).narrow(0, start, numel) for key, value in sources.items()}
        return Fragment(name, offset, numel, views)

    trainable: list[Any] = [p for p in module.parameters() if p.requires_grad]
    if stage == 3:
        for parameter in trainable:
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            offset = world.rank * size
            numel = min(size, parameter.ds_numel - offset)  # the last rank's part is padded
            if numel > 0:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield fragment(names[id(parameter)], offset, numel, flat, start)
    elif stage > 0:
        flats = flat_masters(zero, optimiser)
        for parameter in trainable:
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield fragment(
                    names[id(parameter)],
                    mapping.lp_fragment_address.start,
                    mapping.lp_fragment_address.numel,
                    flats[mapping.param_group_index],
                    mapping.hp_fragment_address.start,
                )
    else:
        pairs: list[tuple[Tensor, Tensor]] = [(p, p) for p in trainable]
        if hasattr(zero, "fp32_groups"):
            pairs = [
                (weight, master)
                for weights, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True)
                for weight, master in zip(weights, masters, strict=True)
            ]
        for index, (parameter, master) in enumerate(pairs):
            whole = fragment(names[id(parameter)], 0, master.numel(), master, 0)
            whole.saved_here = index % world.world_size == world.rank
            yield whole
