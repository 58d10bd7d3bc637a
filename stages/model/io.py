"""Saving and loading models: our layout (model.safetensors beside config.json) and published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster import storage
from cluster.errors import DataInvalid
from stages.model.backbone import build_backbone
from stages.model.config import BackboneConfig, ObjectiveConfig
from stages.model.files import local_copy, read_state
from stages.model.heads import Classifier
from stages.model.itpn import resize_bias_table
from stages.model.layers import Normalisation, resize_grid
from stages.model.mfm import MaskedFeatureModel, published_name

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Parts of a classifier or of pre-training that another kind of model has no place for.
_OTHER_PARTS = (
    "head.", "fc_norm.", "mask_token", "decoder_embed.", "lm_head.", "lm_cls_head.", "norm.", "norm_cls.",
    "cls_pt_layers.", "level_norms.", "level_heads.", "fpn_modules.", "align_dim_", "split_", "block_",
)  # fmt: skip


@dataclass(frozen=True)
class LoadReport:
    """What came of loading weights into a model; every list holds parameter names of the model or the file.

    `missing` keep their initial values; `unexpected` were in the file and fit nothing; `resized` were
    interpolated to the model's grid; `dropped` belong to another kind of model (another head, a pyramid).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def save_model(local_dir: Path | str, model_state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write `model.safetensors` and `config.json` (a model's `describe()`) into a local folder."""
    local_dir = Path(local_dir)
    local_dir.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model_state.items()}
    save_file(state, local_dir / WEIGHTS, metadata={"format": "pt"})
    (local_dir / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def build(config: dict[str, Any]) -> nn.Module:
    """The model that a `config.json` describes, with initial weights; DataInvalid for an unknown kind."""
    backbone = BackboneConfig.parse(config["backbone"])
    model: Any
    match config.get("kind"):
        case "classifier":
            model = Classifier(backbone, config["num_classes"])
            model.classes = _classes(config)
        case "pretrain":
            objective = ObjectiveConfig.parse(config["objective"])
            model = MaskedFeatureModel(backbone, objective, config["teacher_dim"])
        case "backbone":
            return build_backbone(backbone)
        case kind:
            raise DataInvalid(
                "config.json does not describe a model",
                expected="kind classifier, pretrain or backbone",
                found=kind,
            )
    if "normalisation" in config:
        model.normalisation = Normalisation(*(tuple(config["normalisation"][k]) for k in ("mean", "std")))
    return model


def _classes(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Class names of a classifier's config.json; None where it has none."""
    names = config.get("classes")
    if names is not None and len(names) != config["num_classes"]:
        raise DataInvalid(
            "config.json does not name every class",
            expected=f"{config['num_classes']} classes",
            found=f"{len(names)} names",
            remedy="correct 'classes', or remove it",
        )
    return tuple(names) if names is not None else None


def load(uri: str, *, sha256: str | None = None, ema: bool = False) -> nn.Module:
    """A model in evaluation mode; its `forward_features(image)` returns named levels.

    Args:
        uri: a folder or `model.safetensors` in our layout, or a published checkpoint file (`.pt`, `.pth`,
            `.bin`, `.safetensors`), whose architecture is read off its shapes.
        sha256: refuse any other weights file.
        ema: take the averaged weights of a published checkpoint.

    Raises:
        DataInvalid: missing, broken or pinned otherwise, or weights that do not fit their config.
    """
    full = storage.join(uri)
    weights = (
        full if Path(full).suffix in (".safetensors", ".pt", ".pth", ".bin") else storage.join(full, WEIGHTS)
    )
    with local_copy(weights, sha256=sha256) as path:
        state = read_state(path, ema=ema)
    model = build(config_beside(weights) or infer_config(state))
    load_into(model, state, allow_missing=())
    return model.eval()


def config_beside(weights: str) -> dict[str, Any] | None:
    """The `config.json` in the folder of a weights file; None for a published file, which has none."""
    uri = storage.join(storage.join(weights).rsplit("/", 1)[0], CONFIG)
    return storage.read_json(uri) if storage.exists(uri) else None


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], *, allow_missing: tuple[str, ...] | None = None
) -> LoadReport:
    """Copy weights into a model by published names; position tables are resized to the model's grid.

    Our own prefixes (`backbone.`, `pyramid.`) and the flat published names are the same to it. A head of
    another shape is dropped. `allow_missing` lists name prefixes that may be absent from the file; by default
    everything that is no part of a backbone may.

    Raises:
        DataInvalid: something is missing, left over, or has a shape that cannot be resized.
    """
    targets = {published_name(name): (name, value) for name, value in model.state_dict().items()}
    report, fitted = LoadReport(), {}
    for name, value in state.items():
        key = published_name(name)
        if key not in targets:
            (report.dropped if key.startswith(_OTHER_PARTS) else report.unexpected).append(name)
            continue
        own, target = targets[key]
        if value.shape != target.shape:
            if key == "relative_position_index":
                continue  # follows from the grid
            if key.startswith("head."):
                report.dropped.append(name)
                continue
            value = _resize(name, value, target.shape)
            report.resized.append(name)
        fitted[own] = value.to(target.dtype)
    optional = (*_OTHER_PARTS, "gather_embed") if allow_missing is None else allow_missing
    for key, (own, _) in targets.items():
        if own not in fitted and key != "relative_position_index":
            report.missing.append(own)
    absent = [name for name in report.missing if not published_name(name).startswith(optional or ("\0",))]
    if absent or report.unexpected:
        raise DataInvalid(
            "the weights do not fit the model",
            expected=f"every parameter of {type(model).__name__}",
            found=f"missing: {_some(absent)}; unexpected: {_some(report.unexpected)}",
            remedy="check that family, widths and depths are those of the checkpoint",
        )
    model.load_state_dict(fitted, strict=False)
    return report


def load_backbone_into(model: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """`load_into` for fine-tuning: all of the backbone must be there, the rest keeps its initial values."""
    return load_into(model, state)


def _resize(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if name.endswith("pos_embed") and value.shape[-1] == shape[-1]:
        side = round(shape[1] ** 0.5)
        return resize_grid(value, (side, side))
    if name.endswith("relative_position_bias_table") and value.shape[1] == shape[1]:
        side = (round(shape[0] ** 0.5) + 1) // 2
        return resize_bias_table(value, (side, side))
    raise DataInvalid(
        f"parameter {name} has another shape than the model's",
        expected=tuple(shape),
        found=tuple(value.shape),
        remedy="use the backbone size that the checkpoint was made with",
    )


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "none"
    )


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of published weights, read off their names and shapes; heads are width/64, as in them all.

    Raises:
        DataInvalid: neither Fast-iTPN nor iTPN weights.
    """
    flat = {published_name(name): value for name, value in state.items()}
    merges = sorted(
        int(n.split(".")[1]) for n in flat if n.startswith("blocks.") and ".reduction.weight" in n
    )
    positions = flat.get("pos_embed", flat.get("absolute_pos_embed"))
    if len(merges) != 2 or positions is None:
        raise DataInvalid(
            "the weights are neither Fast-iTPN's nor iTPN's",
            expected="a position embedding and two merges among `blocks`",
            found=", ".join(list(state)[:5]),
            remedy="give a published iTPN or Fast-iTPN checkpoint, or a folder with config.json",
        )
    last = max(int(n.split(".")[1]) for n in flat if n.startswith("blocks."))
    width, fast = positions.shape[-1], "pos_embed" in flat
    hidden = flat[f"blocks.{last}.mlp.{'w1' if fast else 'fc1'}.weight"].shape[0]
    backbone = {
        "family": "fast_itpn" if fast else "itpn",
        "img_size": 16 * round(positions.shape[1] ** 0.5),
        "embed_dim": width,
        "depths": (merges[0], merges[1] - merges[0] - 1, last - merges[1]),
        "num_heads": max(1, width // 64),
        "mlp_ratio": hidden / width,
        "init_values": 0.1 if f"blocks.{last}.gamma_1" in flat else None,
    }
    if "lm_head.weight" in flat:
        fpn = flat["align_dim_16to8.weight"].shape[0]
        depth = len({n.split(".")[1] for n in flat if n.startswith("block_16to8.")})
        objective = {"fpn_dim": fpn, "fpn_depth": depth, "auxiliary": "lm_cls_head.weight" in flat}
        dim = flat["lm_head.weight"].shape[0]
        return {"kind": "pretrain", "backbone": backbone, "objective": objective, "teacher_dim": dim}
    if "head.weight" in flat:
        return {"kind": "classifier", "backbone": backbone, "num_classes": flat["head.weight"].shape[0]}
    return {"kind": "backbone", "backbone": backbone}
