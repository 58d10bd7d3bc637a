"""Speed of the backbone: naive attention as published, ours dense, with migration, with gathering, with both.

    python bench/model.py [--quick] [--only-large] [--size NAME] [--device cpu|cuda] [--clock wall|cpu]

For every input size: images per second of forward and of forward + backward, FLOPs per image, peak memory.
Variants take turns, forwards and backwards through the list, so that other load and drift disturb them alike; the
median of a variant's rounds counts (of two rounds the faster one).
Peak memory is that of one pass with one model alone: on a CPU the resident set of a process of its own (the libraries,
about 300 MiB, included), which is also the first round; on a GPU what the device holds while the others are away.
On a GPU it is bf16 and compiled, on a CPU float32 and eager. `--clock cpu` counts the CPU time of this process
in place of wall time (use it with `--threads 1` where others share the machine). `efficiency` is the share of the
FLOPs saved that became time saved. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from naive_model import NaiveFastITPN

from stages.model import backbone_config, build_backbone
from stages.model.config import BackboneConfig, accelerated
from stages.model.flops import backbone_flops

SIZES = (224, 384, 512, 640)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Tokens(nn.Module):
    """A backbone as a function from image to tokens, which is what every variant is timed on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)["tokens"]


VARIANTS = ("naive", "dense", "migration", "gathering", "both")


def variant(config: BackboneConfig, pixels: int, name: str) -> tuple[nn.Module, BackboneConfig]:
    """One model under test with its config; every one is drawn from the same seed."""
    config = config.model_copy(update={"img_size": pixels})
    fast = accelerated(config)
    changes: dict[str, object] = {}
    if name in ("migration", "both"):
        changes["migration"] = fast.migration
    if name in ("gathering", "both"):
        changes["gathering"] = fast.gathering
    config = config.model_copy(update=changes)
    torch.manual_seed(0)
    model = build_backbone(config)
    return (NaiveFastITPN(model) if name == "naive" else Tokens(model)), config


def alone(
    config: BackboneConfig, pixels: int, name: str, train: bool, batch: int, clock: str, threads: int
) -> tuple[float, int | None]:
    """Seconds of the first pass of one variant, and this process's peak of the resident set in bytes.

    To be called in a fresh process. No peak where the system does not tell it.
    """
    torch.set_num_threads(threads)
    model = variant(config, pixels, name)[0].train(train)
    took = seconds(model, torch.randn(batch, 3, pixels, pixels), train, CLOCKS[clock])
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return took, None
    return took, 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def in_a_process(*arguments: Any) -> tuple[float, int | None]:
    """`alone` in a process that ends with it; forked from one that has imported the model and made none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stages.model", "torch._dynamo"])  # imports take longer than a small pass
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(alone, *arguments).result()


def seconds(model: nn.Module, image: Tensor, train: bool, clock: Callable[[], float]) -> float:
    """One forward, or one forward and backward."""
    if image.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    if train:
        model.zero_grad(set_to_none=True)
        model(image).square().mean().backward()
    else:
        with torch.no_grad():
            model(image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def on_the_device(
    model: nn.Module, image: Tensor, train: bool, clock: Callable[[], float]
) -> tuple[nn.Module, float, int]:
    """The compiled model, its seconds, and the device's peak bytes while no other model is there."""
    model.to(image.device, image.dtype)
    compiled = torch.compile(model)
    seconds(compiled, image, train, clock)  # type: ignore[arg-type]
    torch.cuda.reset_peak_memory_stats()
    took = min(seconds(compiled, image, train, clock) for _ in range(2))  # type: ignore[arg-type]
    peak = torch.cuda.max_memory_allocated()
    model.zero_grad(set_to_none=True)
    model.to("cpu")
    torch.cuda.empty_cache()
    return compiled, took, peak  # type: ignore[return-value]


def measure(
    config: BackboneConfig,
    pixels: int,
    *,
    train: bool,
    names: Sequence[str],
    batch: int,
    rounds: int,
    device: torch.device,
    clock: str,
) -> dict[str, dict[str, Any]]:
    """Seconds per image, FLOPs per image and peak bytes of each named variant."""
    gpu, rows = device.type == "cuda", {}
    if gpu:
        torch.compiler.reset()  # one piece of code is compiled for eight models at most, and then runs eagerly
    image = torch.randn(batch, 3, pixels, pixels).to(device, torch.bfloat16 if gpu else torch.float32)
    models: dict[str, nn.Module] = {}
    # The naive model is compiled too: the figure is about attention and layout, not about the compiler.
    compiled: dict[str, nn.Module] = {}
    samples: dict[str, list[float]] = {}
    for name in names:
        if gpu:
            models[name], settings = variant(config, pixels, name)
            compiled[name], took, peak = on_the_device(models[name].train(train), image, train, CLOCKS[clock])
        else:
            threads = torch.get_num_threads()
            took, peak = in_a_process(config, pixels, name, train, batch, clock, threads)
            settings = variant(config, pixels, name)[1]
        flops = backbone_flops(settings, pixels, pixels).total * (3 if train else 1)
        rows[name] = {"gflops": flops / 1e9, "peak_mib": peak and peak / 2**20}
        samples[name] = [took]
    for name in names if rounds > 1 else ():
        if gpu:
            models[name].to(device)
        else:
            compiled[name] = variant(config, pixels, name)[0].train(train)
    for turn in range(rounds - 1):
        for name in list(compiled)[:: -1 if turn % 2 else 1]:
            samples[name].append(seconds(compiled[name], image, train, CLOCKS[clock]))
    for name, row in rows.items():
        row["s"] = statistics.median_low(samples[name]) / batch
    return rows


def report(figures: dict[str, object], label: str, rows: dict[str, dict[str, Any]], key: str) -> None:
    """Print a table of one measurement and add its ratios to the figures, under names that end in `key`."""
    print(
        f"\n{label}\n  {'':10s} {'img/s':>9s} {'GFLOPs':>9s} {'peak MiB':>9s} {'speed-up':>9s} {'efficiency':>10s}"
    )
    dense = rows["dense"]
    for name, row in rows.items():
        speedup = dense["s"] / row["s"]
        saved = 1 - row["gflops"] / dense["gflops"]
        efficiency = (1 - row["s"] / dense["s"]) / saved if saved > 0 else None
        peak = f"{row['peak_mib']:9.0f}" if row["peak_mib"] else "        –"
        share = f"{efficiency:10.0%}" if efficiency is not None else "         –"
        print(
            f"  {name:10s} {1 / row['s']:9.3f} {row['gflops']:9.1f} {peak} {speedup:9.2f} {share}", flush=True
        )
        figures[f"img_s_{name}_{key}"] = round(1 / row["s"], 4)
        if name == "naive":
            figures[f"dense_over_naive_{key}"] = round(1 / speedup, 3)
        elif name != "dense":
            prefix = "accelerated" if name == "both" else name
            figures[f"{prefix}_over_dense_{key}"] = round(speedup, 3)
            figures[f"{prefix}_efficiency_{key}"] = None if efficiency is None else round(efficiency, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="speed of the backbone and of its accelerations")
    parser.add_argument("--quick", action="store_true", help="one size at 512 pixels: a few minutes on a CPU")
    parser.add_argument("--size", default=None, help="backbone (default: tiny on a CPU, large on a GPU)")
    parser.add_argument("--pixels", type=int, nargs="+", default=SIZES, help="input sizes")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument(
        "--rounds", type=int, default=7, help="of forward passes; training takes half as many"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=None,
        help="images at once (default: 8; on a CPU 4 with --quick, 2 at 640 pixels, 1 of B and L)",
    )
    parser.add_argument("--no-large", action="store_true", help="leave out B and L at 640")
    parser.add_argument("--only-large", action="store_true", help="only B and L at 640")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    clock = "wall" if gpu else args.clock
    size = args.size or ("fast_itpn_large" if gpu else "fast_itpn_tiny")
    label = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU"
    figures: dict[str, object] = {
        "device": label,
        "size": size,
        "threads": args.threads,
        "clock": clock,
        "dtype": "bfloat16" if gpu else "float32",
        "torch": torch.__version__,
    }
    config = backbone_config(size, drop_path=0.0)
    common = {"device": device, "clock": clock}

    def time_all(
        config: BackboneConfig, pixels: int, train: bool, names: Sequence[str], batch: int, key: str
    ) -> None:
        batch = args.batch or (8 if gpu else batch)
        rounds = 2 if args.quick else -(-args.rounds // 2) if train else args.rounds
        while True:
            try:
                rows = measure(config, pixels, train=train, names=names, rounds=rounds, batch=batch, **common)
                break
            except torch.OutOfMemoryError:  # on a GPU only: naive attention keeps its matrices
                if batch == 1:
                    raise
            batch //= 2
            torch.cuda.empty_cache()
        what = "forward + backward" if train else "forward"
        title = f"width {config.embed_dim}, {pixels} pixels, batch {batch}, {what}"
        report(figures, title, rows, f"{key}_train" if train else key)

    if args.quick:
        time_all(config, 512, False, VARIANTS, 4, "512")
        time_all(config, 512, True, ["naive", "dense"], 4, "512")
        print(json.dumps(figures))
        return
    for pixels in () if args.only_large else args.pixels:
        for train in (False, True):
            # Naive attention needs 9 GB to train on 8 images of 512 pixels.
            time_all(config, pixels, train, VARIANTS, 8 if pixels < 640 else 2, str(pixels))
    if not args.no_large:
        for name in ("base", "large"):
            large = backbone_config(f"fast_itpn_{name}", drop_path=0.0)
            time_all(large, 640, False, VARIANTS[1:], 1, f"640_{name}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
