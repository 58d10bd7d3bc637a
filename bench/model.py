"""Speed of the backbone: naive attention as published, ours dense, with migration, with gathering, with both.

    python bench/model.py [--quick] [--only-large] [--size NAME] [--device cpu|cuda] [--clock wall|cpu]

For every input size: images per second of forward and of forward + backward, FLOPs per image, peak memory.
Variants take turns, and each one's fastest round counts, so that other load on the machine disturbs them alike.
On a GPU it is bf16 and compiled, on a CPU float32 and eager. `--clock cpu` counts the CPU time of this process
in place of wall time (use it with `--threads 1` where others share the machine). `efficiency` is the share of the
FLOPs saved that became time saved. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from naive_model import NaiveFastITPN

from stages.model import backbone_config, build_backbone
from stages.model.config import BackboneConfig, accelerated
from stages.model.flops import backbone_flops

SIZES = (224, 384, 512, 640)


class Tokens(nn.Module):
    """A backbone as a function from image to tokens, which is what every variant is timed on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)["tokens"]


def variants(config: BackboneConfig, pixels: int, naive: bool) -> dict[str, tuple[nn.Module, BackboneConfig]]:
    """The models under test, all with the same weights."""
    config = config.model_copy(update={"img_size": pixels})
    fast = accelerated(config)
    configs = {
        "dense": config,
        "migration": config.model_copy(update={"migration": fast.migration}),
        "gathering": config.model_copy(update={"gathering": fast.gathering}),
        "both": fast,
    }
    torch.manual_seed(0)
    dense = build_backbone(config)
    out: dict[str, tuple[nn.Module, BackboneConfig]] = {}
    if naive:
        out["naive"] = (NaiveFastITPN(dense), config)
    for name, variant in configs.items():
        model = dense if name == "dense" else build_backbone(variant)
        model.load_state_dict(dense.state_dict(), strict=False)
        out[name] = (Tokens(model), variant)
    return out


def peak_bytes(device: torch.device) -> Callable[[], int | None]:
    """Starts a measurement of peak memory; call the result to end it. None where the system cannot tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident set back
    except OSError:
        return lambda: None
    return lambda: 1024 * int(_status("VmHWM"))


def _status(field: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(field))


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


def measure(
    config: BackboneConfig,
    pixels: int,
    *,
    train: bool,
    names: list[str],
    batch: int,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, dict[str, float | None]]:
    """Seconds per image, FLOPs per image and peak bytes of each named variant."""
    models = {
        name: found for name, found in variants(config, pixels, "naive" in names).items() if name in names
    }
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    image = torch.randn(batch, 3, pixels, pixels).to(device, dtype)
    ready: dict[str, nn.Module] = {}
    for name, (model, _) in models.items():
        model = model.train(train).to(device, dtype)
        # The naive model is compiled too: the figure is about attention and layout, not about the compiler.
        ready[name] = torch.compile(model) if device.type == "cuda" else model  # type: ignore[assignment]
    rows: dict[str, dict[str, float | None]] = {}
    for name, (_, variant) in models.items():
        memory = peak_bytes(device)
        warm = seconds(ready[name], image, train, clock)
        if device.type == "cuda":
            warm = min(seconds(ready[name], image, train, clock) for _ in range(2))
        flops = backbone_flops(variant, pixels, pixels).total * (3 if train else 1)
        rows[name] = {"s": warm, "gflops": flops / 1e9, "peak_mib": (peak := memory()) and peak / 2**20}
    for _ in range(rounds - 1):
        for name, model in ready.items():
            rows[name]["s"] = min(rows[name]["s"] or 0, seconds(model, image, train, clock))
    for row in rows.values():
        row["s"] = (row["s"] or 0) / batch
    return rows


def report(
    figures: dict[str, object], label: str, rows: dict[str, dict[str, float | None]], key: str
) -> None:
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
    parser.add_argument("--quick", action="store_true", help="T at 512, dense and naive: under a minute")
    parser.add_argument("--size", default=None, help="backbone (default: tiny on a CPU, large on a GPU)")
    parser.add_argument("--pixels", type=int, nargs="+", default=SIZES, help="input sizes")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=3)
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
    clock = time.process_time if args.clock == "cpu" and not gpu else time.perf_counter
    size = args.size or ("fast_itpn_large" if gpu else "fast_itpn_tiny")
    names = ["naive", "dense", "migration", "gathering", "both"]
    label = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU"
    figures: dict[str, object] = {
        "device": label,
        "size": size,
        "threads": args.threads,
        "clock": args.clock,
        "dtype": "bfloat16" if gpu else "float32",
        "torch": torch.__version__,
    }
    config = backbone_config(size, drop_path=0.0)
    common = {"device": device, "clock": clock}

    def time_all(
        config: BackboneConfig, pixels: int, train: bool, names: list[str], batch: int, key: str
    ) -> None:
        batch = args.batch or (8 if gpu else batch)
        rounds = 2 if args.quick else args.rounds
        rows = measure(config, pixels, train=train, names=names, rounds=rounds, batch=batch, **common)
        what = "forward + backward" if train else "forward"
        title = f"width {config.embed_dim}, {pixels} pixels, batch {batch}, {what}"
        report(figures, title, rows, f"{key}_train" if train else key)

    if args.quick:
        time_all(config, 512, False, names, 4, "512")
        time_all(config, 512, True, ["naive", "dense"], 4, "512")
        print(json.dumps(figures))
        return
    for pixels in () if args.only_large else args.pixels:
        for train in (False, True):
            # Naive attention needs 9 GB to train on 8 images of 512 pixels.
            time_all(config, pixels, train, names, 8 if pixels < 640 else 2, str(pixels))
    if not args.no_large:
        for name in ("base", "large"):
            large = backbone_config(f"fast_itpn_{name}", drop_path=0.0)
            time_all(large, 640, False, names[1:], 1, f"640_{name}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
