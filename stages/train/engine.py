"""DeepSpeed behind a small surface: forward, backward, a step that can be held back, and the state as fragments."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cluster.distributed import World
from cluster.errors import ConfigError
from stages.train.config import EngineConfig, OptimiserConfig
from stages.train.fragments import Fragment, find_fragments, flat_masters
from stages.train.optim import GuardedAdamW
from stages.train.zero import deepspeed_config, demand_compiler, import_deepspeed, quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    """What became of one optimiser step. `overflow`: fp16 lowered its loss scale, which is no fault."""

    applied: bool
    grad_norm: float
    overflow: bool = False


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

        Raises ConfigError when the micro-batch does not divide the rank's part of the global batch.
        """
        micro = config.micro_batch or rank_batch
        if rank_batch % micro:
            raise ConfigError(
                f"micro_batch {micro} does not divide the {rank_batch} samples that a rank has per step",
                expected="a divisor of global_batch / ranks",
                found=micro,
                remedy=f"set engine.micro_batch to {max(d for d in range(1, micro + 1) if rank_batch % d == 0)}",
            )
        deepspeed = import_deepspeed(world)
        if config.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError(
                "precision fp16 does not work on this device",
                found=world.device,
                remedy="set engine.precision to bf16 or fp32, or train on a GPU",
            )
        if config.precision == "fp16" and config.zero_stage == 0:
            # DeepSpeed 0.19 divides the gradients by the loss scale there without having multiplied the loss.
            raise ConfigError(
                "precision fp16 cannot be used with zero_stage 0",
                expected="zero_stage 1, 2 or 3",
                found=0,
                remedy="set engine.zero_stage=1",
            )
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
                config=deepspeed_config(config, world, micro, rank_batch // micro),
                dist_init_required=False,
            )
        base.skip = False
        if config.compile:
            wrapped.compile()
        engine = cls(
            model=wrapped,
            module=module,
            optimiser=base,
            config=config,
            accumulation=rank_batch // micro,
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
        self.model.step()
        held = self.optimiser.skip
        self.optimiser.skip = False
        overflow = bool(getattr(self.model.optimizer, "overflow", False))
        if not own:
            norm = float(getattr(self.model.optimizer, "_global_grad_norm", math.nan))
        applied = not held and not overflow
        if applied and self.ema_decay:
            self._update_ema()
        return StepResult(applied, norm, overflow and not skip and self.config.precision == "fp16")

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
