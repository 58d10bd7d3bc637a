"""The measuring stick: Fast-iTPN's forward written as the published code computes it.

Maps are (B, C, H, W) and permuted around every norm; attention builds its matrix in fp32 and softmaxes it.
It borrows the parameters of a model of ours, so both compute the same function.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.fast_itpn import Block, ConvBlock, FastITPN
from stages.model.layers import resize_grid


class NaiveFastITPN(nn.Module):
    """Tokens (B, N, C) of a FastITPN, computed the slow way with its parameters."""

    def __init__(self, model: FastITPN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        model = self.model
        stem = model.patch_embed.proj
        x = F.conv2d(image_BCHW, stem.weight, stem.bias, stride=4)
        main = len(model.blocks) - model.config.depths[2]
        for block in model.blocks[:main]:
            x = _conv_block(block, x) if isinstance(block, ConvBlock) else _merge(block, x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2) + resize_grid(model.pos_embed, grid)
        for block in model.blocks[main:]:
            x = _block(block, x)
        return x


def _norm_map(norm: nn.Module, x_BCHW: Tensor) -> Tensor:
    return norm(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv_block(block: ConvBlock, x: Tensor) -> Tensor:
    mlp = block.mlp
    y = F.gelu(F.conv2d(_norm_map(block.norm2, x), mlp.fc1.weight, mlp.fc1.bias))
    return x + F.conv2d(_norm_map(mlp.ffn_ln, y), mlp.fc2.weight, mlp.fc2.bias)


def _merge(block: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(_norm_map(block.norm, x), block.reduction.weight, block.reduction.bias, stride=2)


def _block(block: Block, x: Tensor) -> Tensor:
    attn, mlp = block.attn, block.mlp
    B, N, C = x.shape
    y = block.norm1(x)
    q = F.linear(y, attn.q_proj.weight, attn.q_bias)
    k, v = F.linear(y, attn.k_proj.weight), F.linear(y, attn.v_proj.weight, attn.v_bias)
    q, k, v = (t.reshape(B, N, attn.num_heads, -1).permute(0, 2, 1, 3) for t in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5).float() @ k.float().transpose(-2, -1)).softmax(-1).type_as(v)
    x = x + block.gamma_1 * attn.proj((weights @ v).transpose(1, 2).reshape(B, N, C))
    y = block.norm2(x)
    return x + block.gamma_2 * mlp.w3(mlp.ffn_ln(F.silu(mlp.w1(y)) * mlp.w2(y)))
