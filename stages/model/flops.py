"""Floating-point operations of a forward pass: matrix products only, 2 per multiply-add."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.model.config import BackboneConfig, ObjectiveConfig, check_input_size
from stages.model.teacher import Teacher
from stages.model.windows import Windows, kept, window_order


@dataclass(frozen=True)
class Flops:
    """Per image. `attention` is the part of `total` that grows with the square of the tokens."""

    total: int
    attention: int


def backbone_flops(config: BackboneConfig, height: int, width: int, num_classes: int = 0) -> Flops:
    """Forward FLOPs of the backbone, and of a classifier's head, for one height×width image (pixels).

    A training step costs three times as much (four with activation checkpointing). Norms, activations and
    softmax are left out: under 2 % of the arithmetic.

    Raises:
        ConfigError: a side is no multiple of 16, or a window is larger than the grid.
    """
    check_input_size(height, width)
    C, (depth1, depth2, depth) = config.embed_dim, config.depths
    grid = (height // 16, width // 16)
    N = grid[0] * grid[1]
    total = 2 * 16 * N * 48 * (C // 4)  # stem: 4×4×3 pixels to C/4, 16 positions per token
    for positions, dim, blocks in ((16 * N, C // 4, depth1), (4 * N, C // 2, depth2)):
        total += blocks * 2 * positions * 2 * dim * int(dim * config.bridge_mlp_ratio)
        total += 2 * (positions // 4) * (4 * dim) * (2 * dim)  # the merge after the stage
    per_token = _block_per_token(config)
    gathering, migration = config.gathering, config.migration
    windowed = set() if gathering is None else gathering.windowed_blocks(depth)
    G = 0 if gathering is None else gathering.tokens
    windows: Windows | None = None
    if gathering is not None and windowed:
        windows = Windows(window_order(grid, gathering.window)[1], G)
    tokens, attention = N, 0
    for index in range(depth):
        if windows is not None and index in windowed:
            pairs = sum(count * size * (size + G) for count, size in windows.groups) + G * (tokens + G)
        else:
            pairs = (tokens + G) ** 2
        attention += 2 * 2 * pairs * C
        total += (tokens + G) * per_token
        if migration is not None and index + 1 == migration.block(depth) and migration.keep < 1:
            groups = ((1, tokens),) if windows is None else windows.groups
            if migration.score == "similarity":
                attention += sum(2 * count * size * size * C for count, size in groups)
            windows = None if windows is None else windows.keep(migration.keep)
            tokens = sum(count * kept(size, migration.keep) for count, size in groups)
    return Flops(total + attention + 2 * C * num_classes, attention)


def pretrain_flops(config: BackboneConfig, objective: ObjectiveConfig, teacher_dim: int) -> int:
    """Forward FLOPs of a MaskedFeatureModel for one image: backbone, pyramid, heads, auxiliary branch.

    Hidden tokens count as visible ones: they are replaced, not dropped.
    """
    C, F, N = config.embed_dim, objective.fpn_dim, config.grid**2
    mlp = 2 * 2 * F * 4 * F  # of one position; the pyramid's MLPs are four times as wide
    pyramid = 2 * N * (C * F if C != F else 0) + 2 * 4 * N * (C // 2) * F + 2 * 16 * N * (C // 4) * F
    pyramid += 2 * N * C * 4 * F + 2 * 4 * N * F * 4 * F  # the two splits
    pyramid += mlp * (objective.fpn_depth * (4 + 16) + 1 + 4 + 16) * N
    heads = 2 * N * F * C * 3  # a level's positions share the C features of their token
    heads += 2 * N * C * teacher_dim * (1 if objective.levels == "fused" else 3)
    if objective.auxiliary:
        heads += 2 * (N * _block_per_token(config) + 2 * 2 * N * N * C) + 2 * N * C * teacher_dim
    return backbone_flops(config, config.img_size, config.img_size).total + pyramid + heads


@torch.no_grad()
def teacher_flops(teacher: Teacher) -> int:
    """Forward FLOPs of a teacher's tower for one image, counted by torch on tensors without data."""
    tower = teacher.tower
    state = {
        name: tensor.to("meta") for name, tensor in chain(tower.named_parameters(), tower.named_buffers())
    }
    image = torch.empty(1, 3, teacher.input_size, teacher.input_size, dtype=teacher.dtype, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        functional_call(tower, state, (image,))
    return counter.get_total_flops()


def _block_per_token(config: BackboneConfig) -> int:
    """A main-stage block without its attention matrix, for one token."""
    C, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    return 2 * (4 * C * C + (3 if config.family == "fast_itpn" else 2) * C * hidden)
