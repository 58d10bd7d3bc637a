"""Floating-point operations of a forward pass, from the config alone: matrix products only, 2 per multiply-add."""

from __future__ import annotations

from dataclasses import dataclass

from stages.model.acceleration import Windows, kept, window_order
from stages.model.config import BackboneConfig, check_input_size


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
    hidden = int(C * config.mlp_ratio)
    per_token = 2 * (4 * C * C + (3 if config.family == "fast_itpn" else 2) * C * hidden)

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
