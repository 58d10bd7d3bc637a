"""The tables of docs/scaling.md: `python bench/scaling.py [--write] [--quick]`.

Prints memory and communication per ZeRO stage, goodput against failures, and the recipes' hours, all computed by the
formulae below; `--write` puts them into docs/scaling.md between their marks. With `--quick` only what needs no model.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
GPUS = (8, 64, 512)
MODELS = {"L, 0.312 billion": 0.312e9, "2 billion": 2e9}
BATCH = 2048  # images of a step, all ranks together
LINK = 50e9  # bytes/s that a GPU sends and receives: 400 Gb/s each
H100, A100 = 989.5e12, 312e12  # dense bf16 FLOP/s
MFU = 0.4  # assumed where nothing was measured
IMAGES, HOUR = 1_281_167, 3600.0  # training images of ImageNet-1K; seconds


def state_bytes(parameters: float, ranks: int, stage: int, precision: str) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser (masters, moments) on one rank; ZeRO (arXiv:1910.02054), section 3.

    In fp32 ZeRO-0 needs no masters, the weights are; from stage 1 on DeepSpeed keeps partitioned masters all the same.
    """
    b = 4 if precision == "fp32" else 2
    P, part = parameters, parameters / ranks
    masters = 0.0 if stage == 0 and precision == "fp32" else 4 * (part if stage else P)
    return {
        "weights": b * (part if stage == 3 else P),
        "gradients": b * (part if stage >= 2 else P),
        "optimiser": masters + 2 * 4 * (part if stage else P),
    }


def step_buffer_bytes(parameters: float, ranks: int, stage: int, precision: str) -> float:
    """What the optimiser step needs beside: gradients in fp32 for the masters that this rank updates.

    ZeRO-1 in bf16 adds up gradients in fp32 (`grad_accum_dtype`), so it keeps them whole.
    """
    if stage == 0:
        return 0.0 if precision == "fp32" else 4 * parameters
    whole = stage == 1 and precision == "bf16"
    return 4 * (parameters if whole else parameters / ranks)


def sent_bytes(parameters: float, ranks: int, stage: int, pieces: int = 1) -> float:
    """Bytes that a rank sends (and receives) in one step of so many micro-batches, bf16, ring algorithms."""
    one = 2 * parameters * (ranks - 1) / ranks  # an all-gather or a reduce-scatter; an all-reduce is both
    return one * {0: 2, 1: 3, 2: pieces + 1, 3: 3 * pieces}[stage]


def goodput(interval_s: float, stall_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of time that is progress, failures being exponential; Daly (2006), the complete cost function.

    A save every `interval_s` of work stalls for `stall_s`; a failure costs the work since it, and a restart.
    """
    expected = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + stall_s) / mtbf_s)
    return interval_s / expected


def best_interval(stall_s: float, mtbf_s: float) -> float:
    """Seconds between saves that lose the least; Young (1974)."""
    return math.sqrt(2 * stall_s * mtbf_s)


def hours(flops_per_image: float, epochs: float, gpus: int, peak: float, mfu: float = MFU) -> float:
    """FLOPs x images x epochs / (GPUs x peak x MFU), in hours."""
    return flops_per_image * IMAGES * epochs / (gpus * peak * mfu) / HOUR


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns from the second on are right-aligned."""
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, rule, *rows])


def memory() -> str:
    rows = []
    for model, P in MODELS.items():
        for ranks in GPUS:
            total = [
                sum(state_bytes(P, ranks, stage, "bf16").values())
                + step_buffer_bytes(P, ranks, stage, "bf16")
                for stage in range(4)
            ]
            rows.append([model, str(ranks), *(_short(value / 2**30) for value in total)])
    return table(["model", "GPUs", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"], rows)


def communication() -> str:
    rows = []
    for model, P in MODELS.items():
        for ranks in GPUS:
            sent = [sent_bytes(P, ranks, stage) for stage in range(4)]
            rows.append([model, str(ranks), *(f"{s / 1e9:.2f} GB, {1e3 * s / LINK:.0f} ms" for s in sent)])
    return table(["model", "GPUs", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"], rows)


def failures(stall_s: float = 0.2, restart_s: float = 120.0) -> str:
    rows = []
    for gpu_hours in (50_000, 10_000, 1_000):
        for gpus in GPUS:
            mtbf = gpu_hours * HOUR / gpus
            best = best_interval(stall_s, mtbf)
            shares = [goodput(t, stall_s, restart_s, mtbf) for t in (best, 20 * 60, 2 * HOUR)]
            name = f"{gpu_hours:,} h"
            rows.append(
                [name, str(gpus), f"{_short(mtbf / HOUR)} h", f"{_short(best / 60)} min"]
                + [f"{100 * s:.2f} %" for s in shares]
            )
    headings = ["MTBF of a GPU", "GPUs", "of all", "best interval"]
    return table([*headings, "goodput at it", "at 20 min", "at 2 h"], rows)


def recipes() -> str:
    """The recipes' arithmetic and hours; builds CLIP ViT-L/14 without data to count its FLOPs."""
    from pipeline import recipes as room

    rows = []
    for name in ("tiny", "small", "base", "large"):
        recipe = room.load(f"pretrain_{name}").Recipe()
        student, teacher = pretrain_arithmetic(recipe.pretrain)
        total, tuning = 3 * student + teacher, recipe.finetune
        spent = [hours(total, recipe.pretrain.schedule.epochs, recipe.gpus, peak) for peak in (A100, H100)]
        tuned = []
        for size in recipe.grid.resolution:
            step = finetune_arithmetic(tuning, size)
            tuned.append(f"{hours(step, tuning.schedule.epochs, recipe.gpus, A100):.0f} h at {size}")
        rows.append(
            [f"`pretrain_{name}`", f"{student / 1e9:.0f}", f"{teacher / 1e9:.0f}", f"{total / 1e9:.0f}"]
            + [f"{value:.0f} h" for value in spent]
            + [", ".join(tuned)]
        )
    headings = ["recipe", "student, GFLOP forward", "teacher", "training step", "pre-training on 8 A100"]
    return table([*headings, "on 8 H100", "fine-tuning on 8 A100"], rows)


def clip_large() -> dict[str, tuple[int, ...]]:
    """Shapes of CLIP ViT-L/14's vision tower, in OpenAI's layout."""
    width, layers, patch, grid, dim = 1024, 24, 14, 16, 768
    norms = {f"{norm}.{part}": (width,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    shapes = {
        "class_embedding": (width,), "positional_embedding": (grid**2 + 1, width), "proj": (width, dim),
        "conv1.weight": (width, 3, patch, patch), **norms,
    }  # fmt: skip
    block = {
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
        **{f"{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")},
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def clip_large_teacher(config: Any, device: str) -> Any:
    """A teacher of that architecture with arbitrary weights: its cost is the real one's. On `meta` it has no data."""
    import torch

    from stages.model.clip_tower import ClipTower
    from stages.model.teacher import CLIP_MEAN, CLIP_STD, Teacher, Tower

    where = "meta" if device == "meta" else "cpu"
    state = {name: torch.empty(shape, device=where).normal_(std=0.02) for name, shape in clip_large().items()}
    tower = ClipTower(state, heads=None, quick_gelu=True)
    return Teacher(Tower(tower, 14, 224, 768, CLIP_MEAN, CLIP_STD), config, "", torch.device(device))


def pretrain_arithmetic(config: Any) -> tuple[int, int]:
    """Forward FLOPs of student and of CLIP ViT-L/14, for one image."""
    from stages.model.flops import pretrain_flops, teacher_flops

    teacher = clip_large_teacher(config.teacher, "meta")
    return pretrain_flops(config.backbone, config.objective, teacher.dim), teacher_flops(teacher)


def finetune_arithmetic(config: Any, size: int) -> int:
    """FLOPs of a fine-tuning step for one image of size x size pixels."""
    from stages.model.flops import backbone_flops

    return 3 * backbone_flops(config.backbone, size, size, 1000).total


TABLES = {"memory": memory, "communication": communication, "failures": failures, "recipes": recipes}


def written(text: str, name: str, new: str) -> str:
    """The document with one table replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{new}\n{found[2]}", text, flags=re.DOTALL)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--quick", action="store_true", help="only what needs no model")
    arguments = parser.parse_args()
    text = DOCUMENT.read_text()
    for name, make in TABLES.items():
        if name == "recipes" and arguments.quick:
            continue
        found = make()
        print(f"{name}\n\n{found}\n")
        text = written(text, name, found)
    if arguments.write:
        DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
