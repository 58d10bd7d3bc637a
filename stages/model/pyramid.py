"""The integral pyramid: 1/16 → 1/8 → 1/4, joined with the backbone's stages. Pre-trained with the backbone.

Source: iTPN (2023), `modeling_pretrain.py`; published names. Both families use it: Fast-iTPN's pre-training
code is unpublished, its pyramid follows iTPN's. Works on channels-last maps: every step is per position.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.cpu_inference import Linear, in_pieces
from stages.model.layers import init_weights

MLP_RATIO = 4.0
LEVELS = ("level16", "level8", "level4")


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MlpBlock(nn.Module):
    """x + mlp(norm(x)); published as a block without attention."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * MLP_RATIO))

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return x + self.mlp(self.norm2(x))

        return in_pieces(run, x, dims=1, floats=self.mlp.fc1.out_features)


class Split(nn.Module):
    """Each position becomes 2×2 positions of `out` features."""

    def __init__(self, dim: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.reduction = Linear(dim, 4 * out, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, _ = x_BHWC.shape
        x = self.reduction(self.norm(x_BHWC)).view(B, H, W, 2, 2, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, -1)


class Pyramid(nn.Module):
    """Backbone levels → three maps of `fpn_dim` features.

    Args:
        embed_dim: width of the backbone's main stage; its stages are a half and a quarter as wide.
        fpn_dim: width of the pyramid.
        fpn_depth: MLP blocks after each upsampling.
    """

    def __init__(self, embed_dim: int, fpn_dim: int, fpn_depth: int, eps: float) -> None:
        super().__init__()
        same = embed_dim == fpn_dim  # published: no projection when the widths agree
        self.align_dim_16tofpn = None if same else Linear(embed_dim, fpn_dim)
        self.align_dim_16to8 = Linear(embed_dim // 2, fpn_dim, bias=False)
        self.align_dim_8to4 = Linear(embed_dim // 4, fpn_dim, bias=False)
        self.split_16to8 = Split(embed_dim, fpn_dim, eps)
        self.split_8to4 = Split(fpn_dim, fpn_dim, eps)
        self.block_16to8 = nn.Sequential(*(MlpBlock(fpn_dim, eps) for _ in range(fpn_depth)))
        self.block_8to4 = nn.Sequential(*(MlpBlock(fpn_dim, eps) for _ in range(fpn_depth)))
        self.fpn_modules = nn.ModuleList(MlpBlock(fpn_dim, eps) for _ in LEVELS)
        self.apply(init_weights)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Backbone's `level4|8|16` (NCHW) → pyramid's `level16|8|4`, channels-last (B, H, W, fpn_dim)."""
        top, middle, bottom = (features[name].permute(0, 2, 3, 1) for name in LEVELS)
        x16 = top if self.align_dim_16tofpn is None else self.align_dim_16tofpn(top)
        x8 = self.block_16to8(self.split_16to8(top) + self.align_dim_16to8(middle))
        x4 = self.block_8to4(self.split_8to4(x8) + self.align_dim_8to4(bottom))
        maps = zip(LEVELS, self.fpn_modules, (x16, x8, x4), strict=True)
        return {name: module(x) for name, module, x in maps}


def patch_tokens(x_BHWC: Tensor, size: int) -> Tensor:
    """A map cut into size×size patches: (B, tokens in raster order, size·size·C)."""
    B, H, W, _ = x_BHWC.shape
    x = x_BHWC.reshape(B, H // size, size, W // size, size, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(B, (H // size) * (W // size), -1)
