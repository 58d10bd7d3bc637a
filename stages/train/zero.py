"""DeepSpeed's side of the engine: its import, its configuration, and what it cannot do said before it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from cluster.distributed import World
from cluster.errors import ConfigError
from stages.train.config import EngineConfig


def import_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this device without its chatter and without compiling any op."""
    kind = "cuda" if world.device.startswith("cuda") else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", kind)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it, also when it is alone
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with quiet():
        import deepspeed
        import deepspeed.comm

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Its shared-memory all-reduce would be compiled with g++ at the first start (100 s); gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's collectives call names that torch 2.13 renamed; one line per call site otherwise.
        warnings.filterwarnings(
            "ignore", message=r".*torch.distributed.*is deprecated", category=FutureWarning
        )
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if kind == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


def deepspeed_config(config: EngineConfig, world: World, micro: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration for steps of `accumulation` micro-batches of `micro` samples on each rank."""
    gpu = world.device != "cpu"
    bucket = int(config.bucket_mb * 1e6 / (4 if config.precision == "fp32" else 2))
    plain = config.zero_stage == 0 and config.precision == "fp32"
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world.world_size,
        "gradient_clipping": 0.0 if plain else config.clip_grad,
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": gpu and config.zero_stage > 0,
            "contiguous_gradients": gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": config.zero3_persist_numel,
        },
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "fp16": {
            "enabled": config.precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "hysteresis": 1,
        },
    }
    # Pieces of a step add up in fp32: the 8 bits of bf16 lose small gradients. ZeRO-1 in bf16 always does, since that
    # takes DeepSpeed's optimiser for bf16; elsewhere it would cost memory for nothing with a single piece.
    pieces = accumulation > 1 or (config.zero_stage == 1 and config.precision == "bf16")
    if pieces and config.zero_stage > 0 and config.precision != "fp32":
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def refuse_unsupported(config: EngineConfig, world: World, accumulation: int, *, fp16_works: bool) -> None:
    """Raise ConfigError for what DeepSpeed 0.19 cannot do, or would do wrong without a word."""
    if config.precision == "fp16" and not fp16_works:
        raise ConfigError(
            "precision fp16 does not work on this device",
            found=world.device,
            remedy="set engine.precision to bf16 or fp32, or train on a GPU",
        )
    if config.precision == "fp16" and config.zero_stage == 0:
        # It divides the gradients by the loss scale there without having multiplied the loss.
        raise ConfigError(
            "precision fp16 cannot be used with zero_stage 0",
            expected="zero_stage 1, 2 or 3",
            found=0,
            remedy="set engine.zero_stage=1",
        )
    if config.precision == "bf16" and config.zero_stage == 0 and accumulation > 1:
        raise ConfigError(
            "bf16 with zero_stage 0 would add up the pieces of a step in bf16, which loses small gradients",
            expected="zero_stage 1, 2 or 3, which add them up in fp32, or a single piece",
            found=f"{accumulation} pieces",
            remedy="set engine.zero_stage=1, or engine.micro_batch=null where the memory allows it",
        )


def demand_compiler(world: World) -> None:
    """Raise ConfigError where torch.compile has nothing to make kernels with; it would fail in the first step."""
    if world.device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
            return
        except RuntimeError as error:  # InvalidCxxCompiler
            found = str(error).splitlines()[0]
    else:
        from torch.utils._triton import has_triton

        if has_triton():
            return
        found = "no triton for this GPU"
    raise ConfigError(
        "engine.compile has no compiler to work with",
        expected="a C++ compiler (CXX) on a CPU, triton on a GPU",
        found=found,
        remedy="install it, or set engine.compile=false",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what DeepSpeed prints while it starts; warnings of ours go through logging and are not affected."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield
