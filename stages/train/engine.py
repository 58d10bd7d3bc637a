"""DeepSpeed behind a small surface: forward, backward, a step that can be held back, and the state as fragments."""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cluster.distributed import World
from stages.train.config import EngineConfig, OptimiserConfig
from stages.train.fragments import Fragment, find_fragments, flat_masters
from stages.train.optim import GuardedAdamW
from stages.train.zero import (
    deepspeed_config,
    demand_compiler,
    import_deepspeed,
    quiet,
    refuse_unsupported,
)

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def piece_size(samples: int, most: int) -> int:
    """Samples of a micro-batch: the most that divide a rank's `samples` of a step and are at most `most`.

    Where both are even so is the result: pairs of samples that mixup mixes stay together.
    """
    unit = 2 if samples % 2 == most % 2 == 0 else 1
    units = samples // unit
    return unit * next(d for d in range(min(most // unit, units), 0, -1) if units % d == 0)


@dataclass(frozen=True)
class StepResult:
    """What became of one optimiser step.

    `overflow`: in fp16 a gradient was not finite, and the loss scale was lowered; `at_bottom`: it was the lowest
    already.
    """

    applied: bool
    grad_norm: float
    overflow: bool = False
    at_bottom: bool = False


@dataclass
class Engine:
    """A model under DeepSpeed ZeRO. Build it with `Engine.build`."""

    model: Any  # the DeepSpeed engine: call it to run forward
    module: nn.Module
    optimiser: GuardedAdamW
    config: EngineConfig
    accumulation: int
    world: World
    fragments: list[Fragment]
    frozen: dict[str, Tensor]  # CPU copies of parameters without gradient; they never change
    ema_decay: float = 0.0
    _closed: bool = field(default=False, repr=False)

    @classmethod
    def build(
        cls,
        module: nn.Module,
        groups: list[dict[str, Any]],
        *,
        config: EngineConfig,
        optimiser: OptimiserConfig,
        world: World,
        rank_batch: int,
        ema_decay: float = 0.0,
    ) -> Engine:
        """Wrap `module` (fp32, on the CPU, equal on all ranks) for training.

        A step's `rank_batch` samples are cut into the fewest equal pieces of at most `config.micro_batch`.
        Raises ConfigError for a combination that DeepSpeed cannot do.
        """
        micro = piece_size(rank_batch, config.micro_batch or rank_batch)
        if 2 * micro <= (config.micro_batch or 0) and micro < rank_batch:
            log.warning(
                "pieces of %d samples: the %d that a rank has per step cannot be cut into larger equal ones within "
                "engine.micro_batch = %d; another number of ranks may be faster",
                micro, rank_batch, config.micro_batch,
            )  # fmt: skip
        accumulation = rank_batch // micro
        deepspeed = import_deepspeed(world)
        fp16_works = deepspeed.accelerator.get_accelerator().is_fp16_supported()
        refuse_unsupported(config, world, accumulation, fp16_works=fp16_works)
        if config.compile:
            demand_compiler(world)
        frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
        names = {id(p): n for n, p in module.named_parameters()}
        module.to(world.device)
        base = GuardedAdamW(
            ({key: value for key, value in group.items() if key != "names"} for group in groups), optimiser
        )
        # Some of DeepSpeed's wrappers take a step with zero gradients while they are built, which would decay weights.
        base.skip = True
        with quiet():
            wrapped, _, _, _ = deepspeed.initialize(
                model=module,
                optimizer=base,
                config=deepspeed_config(config, world, micro, accumulation),
                dist_init_required=False,
            )
        base.skip = False
        if config.compile:
            wrapped.compile()
        scaler: Any = getattr(wrapped.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # an exception of no kind; the guard judges it
        engine = cls(
            model=wrapped,
            module=module,
            optimiser=base,
            config=config,
            accumulation=accumulation,
            world=world,
            fragments=[],
            frozen=frozen,
            ema_decay=ema_decay,
        )
        base.ensure_state(engine._masters())
        engine.fragments = list(
            find_fragments(wrapped.optimizer, base, module, names, stage=config.zero_stage, world=world)
        )
        for fragment in engine.fragments if ema_decay else []:
            fragment.tensors["ema"] = fragment.tensors["master"].clone()
        return engine

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations and inputs have."""
        return DTYPES[self.config.precision]

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; reduces them over the ranks as the ZeRO stage needs."""
        self.model.backward(loss)

    def micro_step_done(self) -> None:
        """Tell DeepSpeed that a micro-batch which is not the last of its step is over."""
        self.model.step()

    def step(self, lr: float, *, skip: bool) -> StepResult:
        """Clip and apply the accumulated gradients, or drop them on every rank when `skip` is set.

        Gradients that are not finite on any rank are never applied: the norm is global.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["lr_scale"]
        own = not self._wrapped_optimiser
        norm = self._clip_unwrapped() if own else math.nan
        self.optimiser.skip = skip or (own and not math.isfinite(norm))
        scaler = self._scaler()
        at_bottom = scaler is not None and scaler.cur_scale <= getattr(scaler, "min_scale", -math.inf)
        self.model.step()
        held = self.optimiser.skip
        self.optimiser.skip = False
        overflow = bool(getattr(self.model.optimizer, "overflow", False))
        if not own:
            norm = float(getattr(self.model.optimizer, "_global_grad_norm", math.nan))
        applied = not held and not overflow
        if applied and self.ema_decay:
            self._update_ema()
        lowered = overflow and not skip and self.config.precision == "fp16"
        return StepResult(applied, norm, lowered, lowered and at_bottom)

    def optimiser_steps(self) -> int:
        """Optimiser steps applied so far (AdamW's own count)."""
        return int(self.optimiser.state[self._masters()[0]]["step"].item())

    def scalars(self) -> dict[str, float | None]:
        """The state that is not in fragments, equal on all ranks: AdamW's step count and fp16's loss scale."""
        values: dict[str, float | None] = {"adam_step": self.optimiser_steps()}
        scaler = self._scaler()
        for key in _SCALER_FIELDS:
            if scaler is not None and hasattr(scaler, key):
                values[key] = getattr(scaler, key)
        return values

    def after_load(self, scalars: dict[str, Any]) -> None:
        """Take over `scalars`, and bring the working weights in line with the fragments just filled."""
        for flat in self._masters():
            self.optimiser.state[flat]["step"].fill_(float(scalars["adam_step"]))
        scaler = self._scaler()
        for key in _SCALER_FIELDS:
            if scaler is not None and hasattr(scaler, key) and key in scalars:
                setattr(scaler, key, scalars[key])
        zero = self.model.optimizer
        if self.config.zero_stage == 3:
            for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups"):
            with torch.no_grad():
                for masters, working in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
                    for master, weight in zip(masters, working, strict=True):
                        weight.copy_(master)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and global state, so that this process can build another engine."""
        if self._closed:
            return
        self._closed = True
        self.fragments = []
        with contextlib.suppress(Exception):
            self.model.destroy()
        import deepspeed.comm.comm as comm
        from deepspeed.utils import groups

        comm.cdb = None
        groups._WORLD_GROUP = None

    @property
    def _wrapped_optimiser(self) -> bool:
        return self.model.optimizer is not self.optimiser

    def _scaler(self) -> Any:
        zero = self.model.optimizer
        return getattr(zero, "loss_scaler", None) or getattr(zero, "loss_scale_config", None)

    def _clip_unwrapped(self) -> float:
        """Plain fp32 without ZeRO has no wrapper that clips and knows the norm; same formula as DeepSpeed's."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        if self.config.clip_grad and math.isfinite(norm):
            clip = (norm + 1e-6) / self.config.clip_grad
            if clip > 1:
                torch._foreach_mul_(grads, 1.0 / clip)
        return norm

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.fragments:
            torch._foreach_lerp_(
                [f.tensors["ema"] for f in self.fragments],
                [f.tensors["master"] for f in self.fragments],
                1.0 - self.ema_decay,
            )

    def _masters(self) -> list[Tensor]:
        return flat_masters(self.model.optimizer, self.optimiser)
