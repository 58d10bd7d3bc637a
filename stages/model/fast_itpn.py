"""Fast-iTPN: two C-MLP stages at 1/4 and 1/8, then attention blocks with SwiGLU and sub-LN at 1/16.

Paper: "Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration" (2022-2024).
Parameter names and shapes are those of the published checkpoints. Legend: B batch, H W map, N tokens in
raster order, C width, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.acceleration import run_main_stage
from stages.model.config import BackboneConfig, check_input_size
from stages.model.cpu_inference import Linear, in_pieces
from stages.model.layers import (
    BiasedLinear,
    PatchConv,
    PointwiseConv,
    StemConv,
    add_residual,
    drop_path_rates,
    init_weights,
    resize_grid,
    run_block,
)
from stages.model.windows import WindowOrder, Windows, attend


class Stem(nn.Module):
    """Image → map at 1/4 of the input, C/4 wide; hides patches by replacing their 4×4 block of features."""

    def __init__(self, width: int, stop_grad: bool) -> None:
        super().__init__()
        self.proj = StemConv(width)
        self.stop_grad = stop_grad

    def forward(
        self, image_BCHW: Tensor, mask_BN: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        x = self.proj(image_BCHW)  # (B, H/4, W/4, C/4)
        if self.stop_grad:
            x = x.detach() * 0.9 + x * 0.1
        if mask_BN is None or mask_token is None:
            return x
        B, H, W, width = x.shape
        # The token is laid out as torch's unfold lays out a block: (C/4, 4, 4).
        token = mask_token.view(width, 4, 4).permute(1, 2, 0).reshape(1, 1, 4, 1, 4, width)
        hidden = mask_BN.bool().view(B, H // 4, 1, W // 4, 1, 1)
        return torch.where(hidden, token.to(x.dtype), x.view(B, H // 4, 4, W // 4, 4, width)).reshape(x.shape)


class ConvMlp(nn.Module):
    """Pointwise MLP with a LayerNorm on its hidden features (sub-LN)."""

    def __init__(self, dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=eps)
        self.fc2 = PointwiseConv(hidden, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.fc2(self.ffn_ln(F.gelu(self.fc1(x_BHWC))))


class ConvBlock(nn.Module):
    """One block of stages 1 and 2: no attention, no layer scale."""

    def __init__(self, dim: int, mlp_ratio: float, eps: float, drop_path: float) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), eps)
        self.drop_path = drop_path

    def forward(self, x_BHWC: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return add_residual(x, self.mlp(self.norm2(x)), None, self.drop_path, self.training)

        if self.training:  # drop path draws by the first dimension
            return run(x_BHWC)
        return in_pieces(run, x_BHWC, dims=1, floats=self.mlp.fc1.out_channels)


class ConvMerge(nn.Module):
    """Norm, then a 2×2 stride 2 convolution: halves the map and doubles the width."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.reduction = PatchConv(dim, 2 * dim, 2)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.reduction(self.norm(x))

        return in_pieces(run, x_BHWC, dims=3, floats=x_BHWC[0].numel())


class Attention(nn.Module):
    """Multi-head attention without relative bias; the key projection has no bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = BiasedLinear(dim, dim)
        self.k_proj = BiasedLinear(dim, dim)
        self.v_proj = BiasedLinear(dim, dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(self, x_BNC: Tensor, windows: Windows | None = None) -> Tensor:
        q, k, v = self.q_proj(x_BNC, self.q_bias), self.k_proj(x_BNC), self.v_proj(x_BNC, self.v_bias)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))  # (B, N, heads, D)
        return self.proj(attend(q, k, v, windows))


class SwiGLU(nn.Module):
    """Gated MLP with sub-LN."""

    def __init__(self, dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w2 = Linear(dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=eps)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    """One block of the main stage: pre-norm attention and SwiGLU, each with layer scale and drop path."""

    def __init__(self, config: BackboneConfig, drop_path: float) -> None:
        super().__init__()
        dim, eps = config.embed_dim, config.norm_eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, int(dim * config.mlp_ratio), eps)
        scale = config.init_values
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale)) if scale else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale)) if scale else None
        self.drop_path = drop_path

    def forward(self, x_BNC: Tensor, windows: Windows | None = None) -> Tensor:
        def attend_to_all(x: Tensor) -> Tensor:
            y = self.attn(self.norm1(x), windows)
            return add_residual(x, y, self.gamma_1, self.drop_path, self.training)

        def transform_each(x: Tensor) -> Tensor:
            return add_residual(x, self.mlp(self.norm2(x)), self.gamma_2, self.drop_path, self.training)

        if self.training:
            return transform_each(attend_to_all(x_BNC))
        x_BNC = in_pieces(attend_to_all, x_BNC, dims=2, floats=x_BNC[0].numel())
        return in_pieces(transform_each, x_BNC, dims=1, floats=self.mlp.w1.out_features)


class FastITPN(nn.Module):
    """The backbone. `blocks` holds stage 1, merge, stage 2, merge, main stage in one list, as published."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        C, eps, ratio = config.embed_dim, config.norm_eps, config.bridge_mlp_ratio
        depth1, depth2, _ = config.depths
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, C))
        self.patch_embed = Stem(C // 4, config.stop_grad_stem)
        self.blocks = nn.ModuleList(
            [
                *(ConvBlock(C // 4, ratio, eps, next(rates)) for _ in range(depth1)),
                ConvMerge(C // 4, eps),
                *(ConvBlock(C // 2, ratio, eps, next(rates)) for _ in range(depth2)),
                ConvMerge(C // 2, eps),
                *(Block(config, rate) for rate in rates),
            ]
        )
        window = config.gathering.window if config.gathering else 0
        self.window_order = WindowOrder((config.grid, config.grid), window) if window else None
        gathering = config.gathering.tokens if config.gathering else 0
        self.gather_embed = nn.Parameter(torch.zeros(1, gathering, C)) if gathering else None
        for embedding in (self.pos_embed, self.gather_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        self.apply(init_weights)

    @property
    def mask_token_width(self) -> int:
        """Features of one mask token: the 4×4 block of stem features that a patch covers."""
        return 4 * self.config.embed_dim

    def make_block(self, drop_path: float) -> Block:
        """A further main-stage block, for the auxiliary branch."""
        return Block(self.config, drop_path)

    def run_blocks(self, blocks: Iterable[nn.Module], x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens through further main-stage blocks, all tokens with global attention."""
        recompute = self.config.activation_checkpointing and self.training
        for block in blocks:
            x_BNC = run_block(block, x_BNC, recompute=recompute)
        return x_BNC

    def forward_features(
        self,
        image_BCHW: Tensor,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
        tap: int | None = None,
    ) -> dict[str, Tensor]:
        """Named features of an image.

        Args:
            image_BCHW: normalised image; both sides multiples of 16.
            mask_BN: bool, True where a patch (raster order) is hidden; needs `mask_token`.
            tap: index of a main-stage block whose output is returned too, as `tap`.

        Returns:
            `level4` (B, C/4, H/4, W/4), `level8` (B, C/2, H/8, W/8), `level16` (B, C, H/16, W/16), and
            `tokens` (B, N, C), the same numbers as `level16` in raster order. With migration also `migrated`
            (B, N), bool, True where a token left.

        Raises:
            ConfigError: a side is no multiple of 16.
        """
        H, W = image_BCHW.shape[-2:]
        check_input_size(H, W)
        depth1, depth2, _ = self.config.depths
        recompute = self.config.activation_checkpointing and self.training
        out: dict[str, Tensor] = {}
        x = self.patch_embed(image_BCHW, mask_BN, mask_token)
        for index, block in enumerate(self.blocks[: depth1 + depth2 + 2]):
            if index == depth1:
                out["level4"] = x.permute(0, 3, 1, 2)
            elif index == depth1 + depth2 + 1:
                out["level8"] = x.permute(0, 3, 1, 2)
            x = run_block(block, x, recompute=recompute)
        grid = (H // 16, W // 16)
        x = x.flatten(1, 2) + resize_grid(self.pos_embed, grid)

        def call(block: nn.Module, x_BNC: Tensor, windows: Windows | None, codes: Tensor) -> Tensor:
            return run_block(block, x_BNC, windows, recompute=recompute)

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
