"""Token migration and token gathering: the main stage with fewer tokens and smaller attention.

The Fast-iTPN paper names both and publishes neither; what follows is our design
(docs/decisions/0003-migration-and-gathering.md). Both are off by default and share one main-stage loop:

- *Gathering*: tokens are put in window order; a windowed block lets each window attend to itself and to a
  few gathering tokens, which attend to everything. Gathering tokens ride at the end of the sequence.
- *Migration*: after some blocks the most redundant tokens leave. They wait, and rejoin the others at their
  raster positions after the last block. With windows, every window gives up its own share.

All shapes follow from the config and the grid, so the stage compiles. Legend: B batch, N all tokens, K kept
tokens, G gathering tokens, C width, D head width, S tokens of a window, W windows of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.config import BackboneConfig, MigrationConfig
from stages.model.cpu_inference import in_pieces
from stages.model.windows import WindowOrder, Windows, kept

# (block, tokens, windows or None for global attention, position codes) -> tokens
BlockCall = Callable[[nn.Module, Tensor, Windows | None, Tensor], Tensor]


def run_main_stage(
    x_BNC: Tensor,
    blocks: Iterable[nn.Module],
    grid: tuple[int, int],
    config: BackboneConfig,
    gather_embed: Tensor | None,
    window_order: WindowOrder | None,
    call: BlockCall,
    tap: int | None,
    training: bool,
) -> dict[str, Tensor]:
    """The main stage on tokens in raster order; with gathering, `window_order` is the model's.

    Returns:
        `tokens` (B, N, C) in raster order with the migrated ones back in place; `tap`, the same after block
        `tap`, if asked for; `migrated` (B, N) bool in raster order, if migration took place.
    """
    gathering, migration = config.gathering, config.migration
    inverse: Tensor | None = None  # raster order from window order
    windows: Windows | None = None
    codes = position_codes(grid, x_BNC.device)  # (1, N)
    windowed: set[int] = set()
    if gathering is not None and window_order is not None:
        windowed = gathering.windowed_blocks(config.depths[2])
        if min(grid) == max(grid) == gathering.window and not gathering.tokens:
            windowed = set()  # one window that sees everything is global attention
        order, back, groups = window_order(grid, x_BNC.device)
        if windowed:
            inverse, windows = back, Windows(groups, gathering.tokens)
            x_BNC, codes = x_BNC.index_select(1, order), codes.index_select(1, order)
        if gather_embed is not None:
            # Each starts as the mean of its share of the tokens, so that it carries content at once.
            means = F.adaptive_avg_pool1d(x_BNC.transpose(1, 2), gathering.tokens).transpose(1, 2)
            x_BNC = torch.cat([x_BNC, means + gather_embed.to(x_BNC.dtype)], dim=1)
    leaves_after = None if migration is None else migration.block(config.depths[2])
    waiting: tuple[Tensor, Tensor] | None = None
    out: dict[str, Tensor] = {}
    x = x_BNC
    for index, block in enumerate(blocks):
        x = call(block, x, windows if index in windowed else None, codes)
        if index == tap:
            out["tap"] = _rejoin(x, waiting, inverse, grid)
        if migration is not None and index + 1 == leaves_after and migration.keep < 1:
            N = grid[0] * grid[1]
            stay_BK, windows = choose(x[:, :N], codes, windows, grid, migration, training=training)
            waiting = (x[:, :N], stay_BK)
            stays = x.gather(1, stay_BK.unsqueeze(-1).expand(-1, -1, x.shape[2]))
            x = torch.cat([stays, x[:, N:]], dim=1) if x.shape[1] > N else stays
            codes = codes.expand(x.shape[0], -1).gather(1, stay_BK)
    out["tokens"] = _rejoin(x, waiting, inverse, grid)
    if waiting is not None:
        left = torch.ones(waiting[0].shape[:2], dtype=torch.bool, device=x.device).scatter(
            1, waiting[1], False
        )
        out["migrated"] = left if inverse is None else left.index_select(1, inverse)
    return out


def _rejoin(
    x: Tensor, waiting: tuple[Tensor, Tensor] | None, inverse: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    """All tokens in raster order: those that went through, and those that left, as they were when they did."""
    if waiting is not None:
        left_BNC, stay_BK = waiting
        index = stay_BK.unsqueeze(-1).expand(-1, -1, x.shape[2])
        x = left_BNC.scatter(1, index, x[:, : stay_BK.shape[1]])
    else:
        x = x[:, : grid[0] * grid[1]]
    return x if inverse is None else x.index_select(1, inverse)


def position_codes(grid: tuple[int, int], device: torch.device) -> Tensor:
    """row·(2w−1) + column of each token, (1, N): the difference of two codes names their relative position."""
    h, w = grid
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    return (rows[:, None] * (2 * w - 1) + columns[None, :]).view(1, h * w)


def choose(
    x_BNC: Tensor,
    codes: Tensor,
    windows: Windows | None,
    grid: tuple[int, int],
    migration: MigrationConfig,
    *,
    training: bool,
) -> tuple[Tensor, Windows | None]:
    """Indices (B, K) of the tokens that stay, ascending within each window, and the windows they then form."""
    groups = ((1, x_BNC.shape[1]),) if windows is None else windows.groups
    rank = coarse_rank(codes, grid)
    stay, start = [], 0
    for count, size in groups:
        stop, keep = start + count * size, kept(size, migration.keep)
        x = x_BNC[:, start:stop].detach().unflatten(1, (count, size))
        score = redundancy(x, rank[:, start:stop].unflatten(1, (count, size)), migration.score, training)
        index = score.topk(keep, dim=-1, largest=False, sorted=False).indices.sort(-1).values
        base = start + size * torch.arange(count, device=x.device).view(1, count, 1)
        stay.append((index + base).flatten(1))
        start = stop
    return torch.cat(stay, dim=1), None if windows is None else windows.keep(migration.keep)


def redundancy(x_BWSC: Tensor, rank_1WS: Tensor, score: str, training: bool) -> Tensor:
    """How dispensable each token is within its window, (B, W, S); the highest leave. Ranks are those of `coarse_rank`.

    - `similarity`: the largest cosine similarity, of features minus their mean, to a token of lower rank. As
      only lower ranks count, one token of every group of equals always stays.
    - `norm`: minus the feature norm.
    - `random`: at random while training, else a fixed scatter of the positions.
    """
    if score == "norm":
        return -x_BWSC.float().norm(dim=-1)
    if score == "random":
        if training:
            return torch.rand(x_BWSC.shape[:3], device=x_BWSC.device)
        # Integers, so that every device picks the same tokens; below 2**63 for ranks below 2**20.
        scatter = (rank_1WS * rank_1WS * 1_000_003 + rank_1WS * 7919) % (2**31 - 1)
        return ((scatter * 1_103_515_245 + 12_345) % 2**31).expand(x_BWSC.shape[0], -1, -1)
    later_1WSS = rank_1WS.unsqueeze(-1) <= rank_1WS.unsqueeze(-2)

    def nearest(x_BWSC: Tensor) -> Tensor:
        x = F.normalize(x_BWSC - x_BWSC.mean(2, keepdim=True), dim=-1)
        return (x @ x.transpose(-1, -2)).masked_fill(later_1WSS, -2.0).amax(-1)

    # In fp32 even under autocast: neighbours are so alike that products in bf16 would choose among them by chance.
    with torch.autocast(x_BWSC.device.type, enabled=False):
        return in_pieces(nearest, x_BWSC.float(), dims=3, floats=later_1WSS.numel())


def coarse_rank(codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rank of each token's position, coarse to fine: multiples of 32 in both directions first, then of 16, …

    The first ranks are spread evenly over the image; a finer position must differ from the coarser ones to
    count as worth keeping.
    """
    row = codes // (2 * grid[1] - 1)
    both = row | (codes % (2 * grid[1] - 1))
    finer = sum(((both & (2**bits - 1)) != 0).long() for bits in range(1, 6))
    return finer * (grid[0] * (2 * grid[1] - 1)) + codes
