"""Configs of the model room: backbone, objective, teacher, and the table of named sizes.

Widths, depths and heads of the published sizes: iTPN and Fast-iTPN model definitions (2023-2024).
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.errors import ConfigError
from stages.config import Config, nearest, not_identity

SHA256 = re.compile("[0-9a-f]{64}")


def check_input_size(height: int, width: int, *, error: type[Exception] = ConfigError) -> None:
    """Raise `error` unless both sides (pixels) are positive multiples of 16, naming the nearest that are."""
    for side in (height, width):
        if side <= 0 or side % 16:
            below, above = max(16, side // 16 * 16), max(16, -(-side // 16) * 16)
            valid = f"{below} or {above}" if below != above else str(below)
            raise error(f"image size {side} is no multiple of 16; valid sizes near it: {valid}")


class MigrationConfig(Config):
    """Token migration: after `after_block` blocks of the main stage (null: a third of them) only a share
    `keep` of the tokens goes on; the others rejoin after the last block. `score` says which are redundant.

    With token gathering every window keeps its own share, rounded, and at least one token: `keep` means little to
    windows of a few tokens (a window of 1 keeps its token whatever `keep` is)."""

    after_block: int | None = Field(default=None, ge=1)
    keep: float = Field(default=0.5, gt=0, le=1)
    score: Literal["similarity", "norm", "random"] = "similarity"

    def block(self, depth: int) -> int:
        """Blocks that every token passes, of a main stage with `depth` blocks."""
        return max(1, depth // 3) if self.after_block is None else self.after_block


class GatheringConfig(Config):
    """Token gathering: attention in `window`×`window` windows, and `tokens` gathering tokens that see them all.

    `blocks` lists the main-stage blocks (from 0) that use windows; the others attend globally.
    """

    window: int = Field(default=14, ge=1)
    tokens: int = Field(default=8, ge=0)
    blocks: Literal["all"] | tuple[int, ...] = "all"

    def windowed_blocks(self, depth: int) -> set[int]:
        """Indices of the blocks that use windows."""
        return set(range(depth)) if self.blocks == "all" else set(self.blocks)


class BackboneConfig(Config):
    """A hierarchical backbone: C-MLP stages at 1/4 and 1/8 of the input, attention blocks at 1/16.

    `depths` counts the blocks of stage 1, stage 2 and the main stage; the stages are embed_dim/4,
    embed_dim/2 and embed_dim wide. `img_size` (pixels) sets the grid of the stored position embedding;
    the model takes any input whose sides are multiples of 16.
    """

    family: Literal["fast_itpn", "itpn"] = "fast_itpn"
    img_size: int = 224
    patch_size: Literal[16] = 16
    embed_dim: int = Field(gt=0)
    depths: tuple[int, int, int]
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(default=3.0, gt=0)
    bridge_mlp_ratio: float = Field(default=3.0, gt=0)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    init_values: float | None = Field(default=0.1, description="initial layer scale; null builds none")
    norm_eps: float = Field(default=1e-6, gt=0)
    stop_grad_stem: bool = False  # the stem gets a tenth of its gradient (EVA-02)
    migration: MigrationConfig | None = None
    gathering: GatheringConfig | None = None
    activation_checkpointing: bool = not_identity(False)

    @field_validator("img_size")
    @classmethod
    def _whole_patches(cls, value: int) -> int:
        check_input_size(value, value, error=ValueError)
        return value

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.embed_dim % 16 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} must be a multiple of 16 and of num_heads ({self.num_heads})"
            )
        if min(self.depths[:2]) < 0 or self.depths[2] < 1:
            raise ValueError(f"depths {self.depths}: stages 1 and 2 need at least 0 blocks, the main stage 1")
        depth, grid = self.depths[2], self.grid
        if self.migration is not None and depth == 1:
            raise ValueError("migration needs a main stage of at least 2 blocks; this one has 1")
        if self.migration is not None and self.migration.block(depth) >= depth:
            raise ValueError(
                f"migration.after_block {self.migration.block(depth)}: the main stage has {depth} blocks, "
                f"so valid values are 1 to {depth - 1}"
            )
        if self.gathering is not None:
            if self.gathering.window > grid:
                raise ValueError(
                    f"gathering.window {self.gathering.window} is larger than the {grid}×{grid} grid of a "
                    f"{self.img_size} pixel input; valid values are 1 to {grid}"
                )
            wrong = self.gathering.windowed_blocks(depth) - set(range(depth))
            if wrong:
                raise ValueError(f"gathering.blocks {sorted(wrong)}: valid indices are 0 to {depth - 1}")
        return self

    @property
    def grid(self) -> int:
        """Tokens along one side of an `img_size` input."""
        return self.img_size // self.patch_size


class ObjectiveConfig(Config):
    """Masked feature modelling: what is hidden, which outputs predict the teacher, and the loss.

    `levels`: `fused` sums the three pyramid levels into one prediction, as published; `per_level` gives
    each its own head and loss. `auxiliary` adds the branch at 0.75 of the main stage. `on` chooses the tokens
    that count. Fast-iTPN's own mask ratio is unpublished; 0.4 is EVA-02's. The published iTPN
    hides 75 of 196 (`num_masked=75`).
    """

    levels: Literal["fused", "per_level"] = "fused"
    loss: Literal["smooth_l1", "cosine"] = "smooth_l1"
    on: Literal["all", "masked"] = "all"
    auxiliary: bool = True
    mask_ratio: float = Field(default=0.4, ge=0, lt=1)
    num_masked: int | None = Field(
        default=None, ge=0, description="exact count; takes the place of mask_ratio"
    )
    fpn_dim: int = Field(default=256, gt=0)
    fpn_depth: int = Field(default=1, ge=1)

    def masked_tokens(self, grid: int) -> int:
        """How many of grid×grid tokens each image hides; raises ConfigError when that leaves none visible."""
        count = round(self.mask_ratio * grid * grid) if self.num_masked is None else self.num_masked
        if count >= grid * grid:
            raise ConfigError(
                f"objective.num_masked {count} hides every token of a {grid}×{grid} grid",
                expected=f"at most {grid * grid - 1}",
                found=count,
                remedy="lower objective.num_masked, or set it to null to use objective.mask_ratio",
            )
        if self.on == "masked" and count == 0:
            raise ConfigError(
                "objective.on is 'masked' but no token is masked",
                expected="mask_ratio or num_masked above 0",
                found=count,
                remedy="raise objective.mask_ratio, or set objective.on=all",
            )
        return count


class TeacherConfig(Config):
    """A frozen vision tower that gives the targets.

    `uri`: a folder or file (path or any storage URI), or a Hugging Face hub name (`org/name`). `sha256` pins
    the weights file; of weights in several files beside an index (`model.safetensors.index.json`) it is that of the
    lines which `sha256sum` prints for them in order of name: `sha256sum model-*.safetensors | sha256sum`.
    `input_size` (pixels) differs from the tower's own where the grids would not agree
    otherwise: CLIP L/14 runs at 196 beside a 224 student. `precision` auto is bf16 on a GPU, fp32 on a CPU.
    `published_scaling` squeezes images into [0.5, 1], as the published iTPN code did by mistake. `heads` is
    needed only where the tower does not have width/64 of them.
    """

    uri: str = not_identity()
    sha256: str | None = None
    layout: Literal["auto", "openai", "hf", "open_clip"] = "auto"
    input_size: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    activation: Literal["auto", "gelu", "quick_gelu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    published_scaling: bool = False

    @field_validator("sha256")
    @classmethod
    def _pin(cls, value: str | None) -> str | None:
        if value is not None and not SHA256.fullmatch(value.lower()):
            raise ValueError(f"'{value}' is no sha256 of 64 hexadecimal digits")
        return value and value.lower()


def _fast(img_size: int, width: int, depths: tuple[int, int, int], heads: int, drop: float) -> BackboneConfig:
    return BackboneConfig(img_size=img_size, embed_dim=width, depths=depths, num_heads=heads, drop_path=drop)


def _itpn(width: int, depths: tuple[int, int, int], heads: int, drop: float) -> BackboneConfig:
    return BackboneConfig(
        family="itpn", embed_dim=width, depths=depths, num_heads=heads, mlp_ratio=4.0, drop_path=drop
    )


sizes: dict[str, BackboneConfig] = {
    "fast_itpn_micro": _fast(96, 128, (1, 1, 6), 4, 0.0),
    "fast_itpn_tiny": _fast(224, 384, (1, 1, 12), 6, 0.1),
    "fast_itpn_small": _fast(224, 384, (2, 2, 20), 6, 0.1),
    "fast_itpn_base": _fast(224, 512, (3, 3, 24), 8, 0.1),
    "fast_itpn_large": _fast(224, 768, (2, 2, 40), 12, 0.2),
    "itpn_base": _itpn(512, (3, 3, 24), 8, 0.1),
    "itpn_large": _itpn(768, (2, 2, 40), 12, 0.2),
}


def backbone_config(name: str, **overrides: Any) -> BackboneConfig:
    """The named size with some fields replaced; raises ConfigError for an unknown name, field or value."""
    if name not in sizes:
        raise ConfigError(
            f"unknown backbone size '{name}'",
            expected=", ".join(sizes),
            found=name,
            remedy=nearest(name, list(sizes)),
        )
    return BackboneConfig.parse(sizes[name].model_dump() | overrides)


def accelerated(config: BackboneConfig, img_size: int | None = None) -> BackboneConfig:
    """The config with both accelerations at their documented defaults, for inputs of `img_size` pixels.

    Half of the tokens leave after a third of the main stage; windows are the largest up to 16×16 tokens that
    divide the grid (640 pixels: 10×10), with 8 gathering tokens. Where none from 8×8 on divides it (592 pixels: 37×37)
    they are 16×16, and smaller at the far edges. Up to 256 pixels one window is the whole grid: gathering then saves
    nothing and costs its 8 tokens (4 % more at 224 pixels, 22 % at 96): take `migration` alone there. Speed is
    measured in docs/LOG.md.
    """
    size = img_size or config.img_size
    grid = size // config.patch_size
    largest = min(grid, 16)
    window = max(range(largest // 2 or 1, largest + 1), key=lambda side: (grid % side == 0, side))
    update = {
        "img_size": size,
        "migration": MigrationConfig(keep=0.5),
        "gathering": GatheringConfig(window=window, tokens=8),
    }
    return BackboneConfig.parse(config.model_copy(update=update).model_dump())
