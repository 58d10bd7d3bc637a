"""iTPN (2023): two MLP stages at 1/4 and 1/8, then attention blocks with relative position bias at 1/16.

Paper: "Integrally Pre-Trained Transformer Pyramid Networks" (CVPR 2023). Parameter names and shapes are those
of the published CLIP-supervised checkpoints. Masking happens after stage 2. The published code keeps maps as
(B, tokens, k, k, C); here they are channels-last (B, H, W, C), the same numbers in raster order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.acceleration import position_codes, run_main_stage
from stages.model.config import BackboneConfig, check_input_size
from stages.model.cpu_inference import Linear, in_pieces
from stages.model.layers import StemConv, add_residual, drop_path_rates, init_weights, resize_grid, run_block
from stages.model.pyramid import Mlp
from stages.model.windows import WindowOrder, Windows, attend


class Stem(nn.Module):
    """Image → normalised map at 1/4 of the input, C/4 wide."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.proj = StemConv(width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.norm(self.proj(image_BCHW))


class Merge(nn.Module):
    """2×2 positions side by side, norm, linear: halves the map and doubles the width."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
            return self.reduction(self.norm(torch.cat(corners, dim=-1)))

        return in_pieces(run, x_BHWC, dims=3, floats=x_BHWC[0].numel())


class Attention(nn.Module):
    """Multi-head attention with a table of relative position biases, (2n−1)² rows for an n×n grid."""

    def __init__(self, dim: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2, num_heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x_BNC: Tensor, grid: tuple[int, int], codes: Tensor, windows: Windows | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, D)
        table = resize_bias_table(self.relative_position_bias_table, grid)
        centre = (table.shape[0] - 1) // 2  # the row of a token's position relative to itself

        def bias(query_codes: Tensor, key_codes: Tensor) -> Tensor:
            rows = query_codes.unsqueeze(-1) - key_codes.unsqueeze(-2) + centre
            return F.embedding(rows, table).permute(0, 3, 1, 2)

        return self.proj(attend(q, k, v, windows, codes, bias))


class Block(nn.Module):
    """Pre-norm attention (main stage only) and MLP, with layer scale and drop path."""

    def __init__(self, config: BackboneConfig, dim: int, drop_path: float, *, main: bool, eps: float) -> None:
        super().__init__()
        scale = config.init_values
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps) if main else None
        self.attn = Attention(dim, config.num_heads, config.grid) if main else None
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * (config.mlp_ratio if main else config.bridge_mlp_ratio)))
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale)) if scale and main else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale)) if scale else None

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        codes: Tensor | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        if self.attn is not None and self.norm1 is not None:
            y = self.attn(self.norm1(x), grid, codes, windows)
            x = add_residual(x, y, self.gamma_1, self.drop_path, self.training)

        def transform_each(x: Tensor) -> Tensor:
            return add_residual(x, self.mlp(self.norm2(x)), self.gamma_2, self.drop_path, self.training)

        if self.training:
            return transform_each(x)
        return in_pieces(transform_each, x, dims=1, floats=self.mlp.fc1.out_features)


class ITPN(nn.Module):
    """The backbone. `blocks` holds stage 1, merge, stage 2, merge, main stage in one list, as published."""

    relative_position_index: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        C, eps = config.embed_dim, config.norm_eps
        depth1, depth2, _ = config.depths
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, C))
        # Not needed here, but published checkpoints hold it.
        self.register_buffer("relative_position_index", relative_index((config.grid, config.grid)))
        self.patch_embed = Stem(C // 4, eps)
        self.blocks = nn.ModuleList(
            [
                *(Block(config, C // 4, next(rates), main=False, eps=eps) for _ in range(depth1)),
                Merge(C // 4, eps),
                *(Block(config, C // 2, next(rates), main=False, eps=eps) for _ in range(depth2)),
                Merge(C // 2, eps),
                *(Block(config, C, rate, main=True, eps=eps) for rate in rates),
            ]
        )
        window = config.gathering.window if config.gathering else 0
        self.window_order = WindowOrder((config.grid, config.grid), window) if window else None
        gathering = config.gathering.tokens if config.gathering else 0
        self.gather_embed = nn.Parameter(torch.zeros(1, gathering, C)) if gathering else None
        for embedding in (self.absolute_pos_embed, self.gather_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        self.apply(init_weights)

    @property
    def mask_token_width(self) -> int:
        """Features of one mask token: a token of the main stage."""
        return self.config.embed_dim

    def make_block(self, drop_path: float) -> Block:
        """A further main-stage block, for the auxiliary branch. The published ones have torch's norm eps."""
        return Block(self.config, self.config.embed_dim, drop_path, main=True, eps=1e-5)

    def run_blocks(self, blocks: Iterable[nn.Module], x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens through further main-stage blocks, all tokens with global attention."""
        codes = position_codes(grid, x_BNC.device)
        recompute = self.config.activation_checkpointing and self.training
        for block in blocks:
            x_BNC = run_block(block, x_BNC, grid, codes, recompute=recompute)
        return x_BNC

    def forward_features(
        self,
        image_BCHW: Tensor,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
        tap: int | None = None,
    ) -> dict[str, Tensor]:
        """Named features of an image; arguments, result and errors as `FastITPN.forward_features`."""
        H, W = image_BCHW.shape[-2:]
        check_input_size(H, W)
        depth1, depth2, _ = self.config.depths
        recompute = self.config.activation_checkpointing and self.training
        out: dict[str, Tensor] = {}
        x = self.patch_embed(image_BCHW)
        for index, block in enumerate(self.blocks[: depth1 + depth2 + 2]):
            if index == depth1:
                out["level4"] = x.permute(0, 3, 1, 2)
            elif index == depth1 + depth2 + 1:
                out["level8"] = x.permute(0, 3, 1, 2)
            x = run_block(block, x, recompute=recompute)
        grid = (H // 16, W // 16)
        x = x.flatten(1, 2)
        if mask_BN is not None and mask_token is not None:
            x = torch.where(mask_BN.bool().unsqueeze(-1), mask_token.to(x.dtype), x)
        x = x + resize_grid(self.absolute_pos_embed, grid)

        def call(block: nn.Module, x_BNC: Tensor, windows: Windows | None, codes: Tensor) -> Tensor:
            return run_block(block, x_BNC, grid, codes, windows, recompute=recompute)

        main = self.blocks[depth1 + depth2 + 2 :]
        out |= run_main_stage(
            x, main, grid, self.config, self.gather_embed, self.window_order, call, tap, self.training
        )
        out["level16"] = out["tokens"].transpose(1, 2).unflatten(2, grid)
        return out

    def forward(
        self,
        image_BCHW: Tensor,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
        tap: int | None = None,
    ) -> dict[str, Tensor]:
        """`forward_features`."""
        return self.forward_features(image_BCHW, mask_BN, mask_token, tap)


def relative_index(grid: tuple[int, int]) -> Tensor:
    """Row of the bias table for each pair of tokens of an h×w grid: int64 (N, N)."""
    codes = position_codes(grid, torch.get_default_device())
    return codes.view(-1, 1) - codes + ((2 * grid[0] - 1) * (2 * grid[1] - 1) - 1) // 2


def resize_bias_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square bias table (rows, heads) for another grid: bicubic over (2h−1, 2w−1), the published rule
    (`mmcv_custom/checkpoint.py`). Returned as it is when it fits."""
    side = round(table.shape[0] ** 0.5)
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if (side, side) == size:
        return table
    maps = table.t().reshape(1, -1, side, side).float()
    resized = F.interpolate(maps, size=size, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].t().to(table.dtype)
