"""Saving and loading models: our layout (model.safetensors beside config.json) and published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster import storage
from cluster.errors import DataInvalid
from stages.model.backbone import build_backbone
from stages.model.config import BackboneConfig, GatheringConfig, MigrationConfig, ObjectiveConfig
from stages.model.files import local_copy, read_file
from stages.model.heads import Classifier
from stages.model.infer import infer_config, some, square_side
from stages.model.itpn import resize_bias_table
from stages.model.layers import Normalisation, resize_grid
from stages.model.mfm import MaskedFeatureModel, published_name
from stages.model.places import beside, is_weights_file

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


def load(
    uri: str,
    *,
    sha256: str | None = None,
    ema: bool = False,
    img_size: int | None = None,
    migration: MigrationConfig | Literal["off"] | None = None,
    gathering: GatheringConfig | Literal["off"] | None = None,
) -> nn.Module:
    """A model in evaluation mode; its `forward_features(image)` returns named levels, `load_report` what was loaded.

    Args:
        uri: a folder or `model.safetensors` in our layout, or a published checkpoint file (`.pt`, `.pth`,
            `.bin`, `.safetensors`), whose architecture is read off its shapes.
        sha256: refuse any other weights file.
        ema: take the averaged weights of a published checkpoint.
        img_size: side of the input (pixels) that position tables are resized for; None keeps the model's own.
        migration: token migration, or none ("off"), in place of the model's own setting.
        gathering: token gathering, or none ("off"), in place of the model's own setting. Gathering tokens that the
            weights lack are zero: each then begins as the mean of its share of the tokens.

    `accelerated(model.config)` has the documented defaults of both for an input size.

    Raises:
        ConfigError: the model cannot take that migration or gathering.
        DataInvalid: missing, broken or pinned otherwise, or weights that do not fit their config, all of them.
    """
    full = storage.join(uri)
    weights = full if is_weights_file(full) else storage.join(full, WEIGHTS)
    with local_copy(weights, sha256=sha256) as path:
        state, config = read_described(weights, path, ema=ema)
    config = config or infer_config(state)
    asked = {"migration": migration, "gathering": gathering}
    changes: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    for name, value in asked.items():
        if value is not None:
            changes[name] = None if value == "off" else value.model_dump()
    model: Any = build(config | {"backbone": config["backbone"] | changes})
    if gathering == "off":
        state = {name: value for name, value in state.items() if published_name(name) != "gather_embed"}
    # Without gathering tokens of its own, a model is given untrained ones only where it is asked to gather.
    model.load_report = report = load_into(model, state, allow_missing=("gather_embed",) if gathering else ())
    zero_untrained(model, report)
    if report.dropped:
        raise DataInvalid(
            f"{weights} holds parts that its model has no place for",
            expected=f"weights of a {type(model).__name__}",
            found=some(report.dropped),
            remedy="put a config.json beside it that says what kind of model it is; fine-tuning takes it as it is",
        )
    return model.eval()


@torch.no_grad()
def zero_untrained(model: nn.Module, report: LoadReport) -> None:
    """Set the gathering tokens that weights did not have to zero: they add nothing to the means they begin as."""
    for name in report.missing:
        if published_name(name) == "gather_embed":
            model.get_parameter(name).zero_()


def read_described(
    uri: str, path: Path, *, ema: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of the weights file at `uri`, of which `path` is a local copy, and its model's config.

    The config is the one in the file itself, else the `config.json` beside it; None where there is neither, as
    with published checkpoints: `infer_config` reads it off the shapes.
    """
    state, own = read_file(path, ema=ema)
    return state, own or config_beside(uri)


def config_beside(weights: str) -> dict[str, Any] | None:
    """The `config.json` in the folder of a weights file; None where there is none, or one of another program."""
    uri = beside(weights, CONFIG)
    found = storage.read_json(uri) if storage.exists(uri) else None
    return found if isinstance(found, dict) and "backbone" in found else None


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
            found=f"missing: {some(absent)}; unexpected: {some(report.unexpected)}",
            remedy="check that family, widths and depths are those of the checkpoint",
        )
    model.load_state_dict(fitted, strict=False)
    return report


def load_backbone_into(model: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """`load_into` for fine-tuning: all of the backbone must be there, the rest keeps its initial values."""
    return load_into(model, state)


def _resize(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if name.endswith("pos_embed") and value.shape[-1] == shape[-1]:
        square_side(name, value.shape[-2])
        side = round(shape[1] ** 0.5)
        return resize_grid(value, (side, side))
    if name.endswith("relative_position_bias_table") and value.shape[1] == shape[1]:
        square_side(name, value.shape[0])
        side = (round(shape[0] ** 0.5) + 1) // 2
        return resize_bias_table(value, (side, side))
    raise DataInvalid(
        f"parameter {name} has another shape than the model's",
        expected=tuple(shape),
        found=tuple(value.shape),
        remedy="use the backbone size that the checkpoint was made with",
    )
