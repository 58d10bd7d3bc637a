"""What a published checkpoint is, read off the names and shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cluster.errors import DataInvalid
from stages.model.config import sizes
from stages.model.mfm import published_name

_PUBLISHED_WIDTHS = {config.embed_dim for name, config in sizes.items() if name != "fast_itpn_micro"}


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of published weights, read off their names and shapes.

    Fast-iTPN's shapes do not tell the heads: they are width/64 in the published sizes; others are refused.

    Raises:
        DataInvalid: neither Fast-iTPN nor iTPN weights, or the shapes do not tell everything.
    """
    flat = {published_name(name): value for name, value in state.items()}
    try:
        return _inferred(flat)
    except (KeyError, IndexError, ValueError) as error:
        raise DataInvalid(
            "the weights are neither Fast-iTPN's nor iTPN's",
            expected=f"parameter {error.args[0]}" if isinstance(error, KeyError) else "their names",
            found=some(list(state)) if isinstance(error, KeyError) else str(error)[:200],
            remedy="give a published iTPN or Fast-iTPN checkpoint, or a folder with config.json",
        ) from None


def _inferred(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    numbers = sorted({int(name.split(".")[1]) for name in flat if name.startswith("blocks.")})
    merges = [number for number in numbers if f"blocks.{number}.reduction.weight" in flat]
    positions = flat.get("pos_embed", flat.get("absolute_pos_embed"))
    if len(merges) != 2 or positions is None:
        raise DataInvalid(
            "the weights are neither Fast-iTPN's nor iTPN's",
            expected="a position embedding and two merges among `blocks`",
            found=some(list(flat)),
            remedy="give a published iTPN or Fast-iTPN checkpoint, or a folder with config.json",
        )
    last, width, fast = numbers[-1], positions.shape[-1], "pos_embed" in flat
    side = square_side("the position embedding", positions.shape[-2])
    backbone: dict[str, Any] = {
        "family": "fast_itpn" if fast else "itpn",
        "img_size": 16 * side,
        "embed_dim": width,
        "depths": (merges[0], merges[1] - merges[0] - 1, last - merges[1]),
        "num_heads": _heads(flat, last, width, fast),
        "mlp_ratio": _ratio(flat[f"blocks.{last}.mlp.{'w1' if fast else 'fc1'}.weight"]),
        "init_values": 0.1 if f"blocks.{last}.gamma_1" in flat else None,
    }
    bridge = [number for number in numbers if number < merges[1] and number not in merges]
    if bridge:
        backbone["bridge_mlp_ratio"] = _ratio(flat[f"blocks.{bridge[0]}.mlp.fc1.weight"])
    levels = {"fused": "lm_head.weight", "per_level": "level_heads.0.weight"}
    for name, head in levels.items():
        if head in flat:
            objective = {
                "levels": name,
                "fpn_dim": flat["align_dim_16to8.weight"].shape[0],
                "fpn_depth": len({n.split(".")[1] for n in flat if n.startswith("block_16to8.")}),
                "auxiliary": "lm_cls_head.weight" in flat,
            }
            dim = flat[head].shape[0]
            return {"kind": "pretrain", "backbone": backbone, "objective": objective, "teacher_dim": dim}
    if "head.weight" in flat:
        return {"kind": "classifier", "backbone": backbone, "num_classes": flat["head.weight"].shape[0]}
    return {"kind": "backbone", "backbone": backbone}


def _heads(flat: Mapping[str, Tensor], last: int, width: int, fast: bool) -> int:
    if not fast:  # the bias table has a column for each
        return flat[f"blocks.{last}.attn.relative_position_bias_table"].shape[1]
    if width not in _PUBLISHED_WIDTHS:
        raise DataInvalid(
            f"the number of attention heads cannot be read off weights of width {width}",
            expected=f"a published width ({', '.join(map(str, sorted(_PUBLISHED_WIDTHS)))}), or a config",
            found="a file without one",
            remedy="put config.json (with backbone.num_heads) beside the file, or export it again",
        )
    return width // 64


def _ratio(weight: Tensor) -> float:
    """Hidden width over width, such that width · ratio, cut to an integer, gives the hidden width again."""
    hidden, width = weight.shape[:2]
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def square_side(what: str, tokens: int) -> int:
    """Side of a square table of positions; raises DataInvalid when it is not square."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise DataInvalid(
            f"{what} is not that of a square grid without class token",
            expected="a square number of rows",
            found=tokens,
            remedy="give a published iTPN or Fast-iTPN checkpoint",
        )
    return side


def some(names: list[str]) -> str:
    """A few names for a message."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "none"
