"""Block-wise masks that hide exactly the number of patches asked for (after BEiT's masking generator).

BEiT draws rectangles until its budget is used up and may stop short of it; here the last rectangle is cut
to what is left, so every image hides the same count and shapes stay static.
"""

from __future__ import annotations

import math

import numpy as np

_BEIT_MIN_BLOCK, _BEIT_PATCHES = 16, 196  # BEiT's smallest rectangle on its 14×14 grid
_MIN_ASPECT = 0.3
_TRIES = 10  # rectangles proposed before falling back to the largest gain seen


def block_mask(grid: int, num_masked: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """A mask for grid×grid patches, True where hidden, flattened in raster order.

    Rectangles have an area of at least 16 patches on BEiT's 14×14 grid, scaled with the grid's area (not
    under 2), and an aspect ratio in 0.3–3.3. Equal arguments give equal masks, on every machine.

    Raises:
        ValueError: `num_masked` is not in 0..grid².
    """
    if not 0 <= num_masked <= grid * grid:
        raise ValueError(f"num_masked {num_masked} is not in 0..{grid * grid} (grid {grid}×{grid})")
    smallest = max(2, round(_BEIT_MIN_BLOCK * grid * grid / _BEIT_PATCHES))
    entropy = seed if isinstance(seed, int) else list(seed)
    # Uniform numbers are drawn in one go: a call to the generator costs more than the arithmetic.
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    uniform = iter(generator.random((64, 4)).tolist())
    mask = np.zeros((grid, grid), dtype=bool)
    left = num_masked
    while left > 0:
        best: tuple[int, slice, slice] | None = None
        for _ in range(_TRIES):
            u = next(uniform, None)
            if u is None:
                return _fill(mask, left, generator)
            area = smallest + u[0] * max(left - smallest, 0)
            aspect = math.exp((2 * u[1] - 1) * -math.log(_MIN_ASPECT))
            height = min(grid, max(1, round(math.sqrt(area * aspect))))
            width = min(grid, max(1, round(math.sqrt(area / aspect))))
            top, side = int(u[2] * (grid - height + 1)), int(u[3] * (grid - width + 1))
            rows, columns = slice(top, top + height), slice(side, side + width)
            gain = height * width - int(np.count_nonzero(mask[rows, columns]))
            if gain > (best[0] if best else 0):
                best = (gain, rows, columns)
                if gain <= left:
                    break
        if best is None:
            continue
        gain, rows, columns = best
        if gain <= left:
            mask[rows, columns] = True
            left -= gain
        else:  # the rectangle is larger than what is left: hide its first new patches, row by row
            new_rows, new_columns = np.nonzero(~mask[rows, columns])
            mask[new_rows[:left] + rows.start, new_columns[:left] + columns.start] = True
            left = 0
    return mask.reshape(-1)


def _fill(mask: np.ndarray, left: int, generator: np.random.Generator) -> np.ndarray:
    """Hide `left` further patches at random: reached only when almost everything is hidden already."""
    flat = mask.reshape(-1)
    flat[generator.permutation(np.flatnonzero(~flat))[:left]] = True
    return flat
