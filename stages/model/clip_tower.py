"""The CLIP vision tower, in OpenAI's key layout, with converters from the others.

Source: openai/CLIP `model.py` (VisionTransformer). One implementation serves every CLIP checkpoint: Hugging
Face and open_clip weights are renamed on loading.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import DataInvalid


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        B, N, _ = x_BNC.shape
        qkv = F.linear(x_BNC, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.quick_gelu = quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, quick_gelu: bool, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = _Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(width, hidden, quick_gelu)

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BNC = x_BNC + self.attn(self.ln_1(x_BNC))
        return x_BNC + self.mlp(self.ln_2(x_BNC))


class ClipTower(nn.Module):
    """CLIP's vision transformer, built to fit a state dict in OpenAI's layout (without the `visual.` prefix).

    Args:
        state: weights; they give every size but the number of heads.
        heads: attention heads; None takes width/64, as all released CLIP models have.
        quick_gelu: x·σ(1.702x) instead of GELU (OpenAI's weights).
        eps: of every LayerNorm.

    Raises:
        DataInvalid: keys are missing or left over, or the heads do not divide the width.
    """

    def __init__(
        self, state: dict[str, Tensor], *, heads: int | None, quick_gelu: bool, eps: float = 1e-5
    ) -> None:
        super().__init__()
        try:
            width, _, self.patch_size, _ = state["conv1.weight"].shape
            positions, self.dim = state["positional_embedding"].shape[0], state["proj"].shape[1]
            hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        except KeyError as error:
            raise DataInvalid(
                "the teacher's weights are no CLIP vision transformer",
                expected="conv1.weight, positional_embedding, proj, transformer.resblocks.*",
                found=f"no {error}; keys such as {', '.join(list(state)[:4])}",
                remedy="give a CLIP checkpoint with a ViT tower, or set teacher.layout",
            ) from None
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
        self.native_grid = round((positions - 1) ** 0.5)
        heads = heads or max(1, width // 64)
        if width % heads:
            raise DataInvalid(
                f"a tower of width {width} cannot have {heads} heads",
                expected=f"a divisor of {width}",
                found=heads,
                remedy="correct teacher.heads",
            )
        with torch.device("meta"):
            self.class_embedding = nn.Parameter(torch.empty(width))
            self.positional_embedding = nn.Parameter(torch.empty(positions, width))
            self.proj = nn.Parameter(torch.empty(width, self.dim))
            self.conv1 = nn.Conv2d(3, width, self.patch_size, self.patch_size, bias=False)
            self.ln_pre = nn.LayerNorm(width, eps=eps)
            blocks = nn.ModuleList(_Block(width, hidden, heads, quick_gelu, eps) for _ in range(layers))
            self.transformer = nn.ModuleDict({"resblocks": blocks})
            self.ln_post = nn.LayerNorm(width, eps=eps)
        try:
            self.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        except RuntimeError as error:
            raise DataInvalid(
                "the teacher's weights do not fit a CLIP tower", found=str(error)[:600]
            ) from None

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised image → projected patch tokens (B, N, dim) and class embedding (B, dim).

        Patch tokens take the same way as the class token: ln_post, then the projection.
        """
        x = self.conv1(image_BCHW)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self._positions(grid).to(x.dtype))
        for block in cast(nn.ModuleList, self.transformer["resblocks"]):
            x = block(x)
        x = self.ln_post(x) @ self.proj
        return x[:, 1:], x[:, 0]

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        """Positions for another grid, by the published rule: bicubic with scale (size + 0.1) / n."""
        n = self.native_grid
        if grid == (n, n):
            return self.positional_embedding
        first, rest = self.positional_embedding[:1], self.positional_embedding[1:]
        maps = rest.float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
        scale = [(size + 0.1) / n for size in grid]
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([first, maps.permute(0, 2, 3, 1).flatten(0, 2).to(first.dtype)])


def from_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision part of a state dict in OpenAI's or open_clip's layout, without its prefix."""
    if any(name.startswith("visual.") for name in state):
        return {n.removeprefix("visual."): v for n, v in state.items() if n.startswith("visual.")}
    return dict(state)


_HF_NAMES = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision part of a Hugging Face CLIP state dict (CLIPModel or CLIPVisionModelWithProjection).

    Raises:
        DataInvalid: it has no vision tower or no projection.
    """
    prefix = "vision_model."
    vision = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        out = {
            "class_embedding": vision["embeddings.class_embedding"].flatten(),
            "positional_embedding": vision["embeddings.position_embedding.weight"],
            "conv1.weight": vision["embeddings.patch_embedding.weight"],
            "proj": state["visual_projection.weight"].t().contiguous(),
        }
        for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
            out |= {f"{ours}.{part}": vision[f"{theirs}.{part}"] for part in ("weight", "bias")}
        layers = {int(name.split(".")[2]) for name in vision if name.startswith("encoder.layers.")}
        for layer in layers:
            theirs, ours = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            for part in ("weight", "bias"):
                out[f"{ours}.attn.in_proj_{part}"] = torch.cat(
                    [vision[f"{theirs}.self_attn.{x}_proj.{part}"] for x in "qkv"]
                )
                out |= {f"{ours}.{b}.{part}": vision[f"{theirs}.{a}.{part}"] for a, b in _HF_NAMES.items()}
    except KeyError as error:
        raise DataInvalid(
            "the teacher is no Hugging Face CLIP with a projected vision tower",
            expected=f"key {error}",
            found=", ".join(list(state)[:4]),
            remedy="give a CLIPModel or CLIPVisionModelWithProjection, or set teacher.layout",
        ) from None
    return out


def hf_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """ClipTower's heads, activation and eps from a Hugging Face config.json."""
    vision = config.get("vision_config", config)
    return {
        "heads": vision["num_attention_heads"],
        "quick_gelu": vision.get("hidden_act", "quick_gelu") == "quick_gelu",
        "eps": vision.get("layer_norm_eps", 1e-5),
    }


def open_clip_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """ClipTower's heads and activation from an open_clip_config.json."""
    model = config.get("model_cfg", config)
    vision = model["vision_cfg"]
    return {
        "heads": vision["width"] // vision.get("head_width", 64),
        "quick_gelu": bool(model.get("quick_gelu", False)),
    }
