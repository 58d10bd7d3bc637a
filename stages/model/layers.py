"""Small pieces that both backbones share. Maps are channels-last: x_BHWC; token sequences are x_BNC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.model.cpu_inference import in_pieces, product


class Normalisation(NamedTuple):
    """Mean and standard deviation, per channel of RGB in [0, 1], that inputs of a model are normalised with."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def described(normalisation: Normalisation | None) -> dict[str, Any]:
    """Its part of a model's config.json; nothing where it is not known."""
    if normalisation is None:
        return {}
    return {"normalisation": {"mean": list(normalisation.mean), "std": list(normalisation.std)}}


def init_weights(module: nn.Module) -> None:
    """Published initialisation: linear weights normal with std 0.02 cut at ±2, biases 0, norms at identity.

    Convolutions keep torch's default, as in the published code.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution on a channels-last map, computed as a matrix product: no permutes, no layout change.

    The weight keeps its published convolution shape (out, in, 1, 1).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return product(x_BHWC, self.weight.flatten(1), self.bias)


class PatchConv(nn.Conv2d):
    """A k×k convolution with stride k on a channels-last map, as one matrix product over its k×k blocks."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size, size)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        k = self.kernel_size[0]
        blocks = x_BHWC.reshape(B, H // k, k, W // k, k, C).permute(0, 1, 3, 2, 4, 5).flatten(3)
        return product(blocks, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class StemConv(nn.Conv2d):
    """The 4×4, stride 4 stem: image (B, 3, H, W) → map (B, H/4, W/4, outputs)."""

    def __init__(self, outputs: int) -> None:
        super().__init__(3, outputs, 4, 4)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        H, W = image_BCHW.shape[-2:]
        return in_pieces(self._maps, image_BCHW, dims=3, floats=H * W // 16 * self.out_channels)

    def _maps(self, image_BCHW: Tensor) -> Tensor:
        B, C, H, W = image_BCHW.shape
        blocks = image_BCHW.reshape(B, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return product(blocks, self.weight.flatten(1), self.bias)


class BiasedLinear(nn.Linear):
    """A linear map whose bias, if any, belongs to its parent (published names: q_proj.weight, q_bias).

    The weight is read in this module's own forward, so that ZeRO-3 gathers it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(x, self.weight, bias)


def add_residual(x: Tensor, y: Tensor, gamma: Tensor | None, drop_path: float, training: bool) -> Tensor:
    """x + drop_path(gamma · y): layer scale and stochastic depth per sample (first dimension)."""
    if training and drop_path > 0:
        keep = 1 - drop_path
        y = y * y.new_empty((y.shape[0],) + (1,) * (y.dim() - 1)).bernoulli_(keep).div_(keep)
    # One fused pass instead of a product and a sum.
    return x + y if gamma is None else torch.addcmul(x, gamma, y)


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Rates that rise linearly from 0 to `last` over all blocks of the backbone."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def resize_grid(table_1NC: Tensor, size: tuple[int, int]) -> Tensor:
    """A square table of positions (1, n·n, C) resized bicubic (align_corners=False) to (1, h·w, C)."""
    side = round(table_1NC.shape[1] ** 0.5)
    if (side, side) == size:
        return table_1NC
    grid = table_1NC.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).to(table_1NC.dtype)


def run_block(block: Callable[..., Tensor], *args: Any, recompute: bool) -> Tensor:
    """Call a block, keeping only its inputs for the backward pass when `recompute` is set."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
