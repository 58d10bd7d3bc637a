"""Attention in windows with a few gathering tokens: how a grid falls into windows, and attention inside them.

Token gathering of stages/model/acceleration.py, which says how it is used. Legend: B batch, N all tokens, K kept
tokens, G gathering tokens, D head width, S tokens of a window, W windows of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError

# (query codes, key codes) -> additive bias (batch, heads, queries, keys); codes are (batch, tokens)
BiasCall = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """How a sequence in window order falls into windows.

    `groups` lists (windows, tokens of each) for runs of equal windows: a grid that the window does not divide
    has smaller windows at its far edges. They are exact: the padding that would make them equal would be
    masked out of every attention, so it is never computed. `gathering` tokens follow at the end.
    """

    groups: tuple[tuple[int, int], ...]
    gathering: int

    def keep(self, share: float) -> Windows:
        """The same windows after each has kept a share of its tokens, at least one."""
        return Windows(tuple((count, kept(size, share)) for count, size in self.groups), self.gathering)

    @property
    def tokens(self) -> int:
        """Tokens in windows, gathering tokens not counted."""
        return sum(count * size for count, size in self.groups)


def kept(tokens: int, share: float) -> int:
    """How many of `tokens` stay when a share is kept: rounded, at least one."""
    return max(1, round(tokens * share))


def window_order(grid: tuple[int, int], window: int) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Raster index of each token in window order, int64 (N,), and the groups of equal windows.

    Windows of equal token count stand side by side, the largest first, else in raster order.

    Raises:
        ConfigError: the window is larger than the grid.
    """
    h, w = grid
    if window > min(h, w):
        raise ConfigError(
            f"gathering.window {window} is larger than the {h}×{w} grid of a {16 * h}×{16 * w} input",
            expected=f"at most {min(h, w)}",
            found=window,
            remedy=f"gathering.window={min(h, w)}, or an input of at least {16 * window}×{16 * window}",
        )
    raster = torch.arange(h * w).view(h, w)
    blocks = [
        raster[i : i + window, j : j + window] for i in range(0, h, window) for j in range(0, w, window)
    ]
    blocks.sort(key=lambda block: -block.numel())  # stable: equal sizes stay in raster order
    counts: dict[int, int] = {}
    for block in blocks:
        counts[block.numel()] = counts.get(block.numel(), 0) + 1
    groups = tuple((count, size) for size, count in counts.items())
    return torch.cat([block.flatten() for block in blocks]), groups


class WindowOrder(nn.Module):
    """`window_order` and its inverse, kept on the model's device for its own grid; of others made anew in each call.

    Made in the forward pass they would be built on the CPU, copied to the device and sorted there every time.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, grid: tuple[int, int], window: int) -> None:
        super().__init__()
        self.grid, self.window = grid, window
        order, self.groups = window_order(grid, window)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)

    def forward(
        self, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
        """Order, its inverse (int64, (N,)) and the groups of equal windows; raises as `window_order`."""
        if grid == self.grid:
            return self.order, self.inverse, self.groups
        order, groups = window_order(grid, self.window)
        order = order.to(device)
        return order, order.argsort(), groups


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows | None,
    codes: Tensor | None = None,
    bias: BiasCall | None = None,
) -> Tensor:
    """Attention of projected tokens (B, K+G, heads, D) → (B, K+G, heads·D).

    Args:
        windows: None for global attention over the whole sequence.
        codes: position codes (batch or 1, K), handed to `bias` for relative position biases. Pairs with a
            gathering token have none.
    """
    if windows is None:
        mask = None
        if bias is not None and codes is not None:
            extra = q.shape[1] - codes.shape[1]
            mask = F.pad(bias(codes, codes), (0, extra, 0, extra))
        return _sdpa(q, k, v, mask)
    G, end = windows.gathering, windows.tokens
    B, _, heads, D = q.shape
    outputs, start = [], 0
    for count, size in windows.groups:
        stop = start + count * size
        # (B, W, S, heads, D); each window's keys are its own tokens and all gathering tokens.
        parts = [t[:, start:stop].reshape(B, count, size, heads, D) for t in (q, k, v)]
        if G:
            for i, t in ((1, k), (2, v)):
                shared = t[:, end:].unsqueeze(1).expand(B, count, G, heads, D)
                parts[i] = torch.cat([parts[i], shared], dim=2)
        mask = None
        if bias is not None and codes is not None:
            local = codes[:, start:stop].reshape(-1, size)  # (batch·W, S)
            mask = F.pad(bias(local, local), (0, G))
            if codes.shape[0] != B:
                mask = mask.repeat(B, 1, 1, 1)
        q_w, k_w, v_w = (t.flatten(0, 1) for t in parts)
        out = _sdpa(q_w, k_w, v_w, mask)
        outputs.append(out.view(B, count * size, heads * D))
        start = stop
    if G:
        outputs.append(_sdpa(q[:, end:], k, v, None))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
