"""Export of a model: our layout, the published layout, and ONNX checked against torch with onnxruntime.

ONNX needs the extra `onnx` (onnx, onnxscript, onnxruntime).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError, StepFailed
from stages.model.config import BackboneConfig, GatheringConfig, MigrationConfig, check_input_size
from stages.model.files import OWN_CONFIG
from stages.model.io import load, save_model
from stages.model.mfm import MaskedFeatureModel

Format = Literal["itpn", "published", "onnx"]
FORMATS: tuple[Format, ...] = ("itpn", "published", "onnx")
ONNX_TOLERANCE = 1e-3  # relative to the largest value of an output
_MAPS = ("level4", "level8", "level16", "pyramid4", "pyramid8", "pyramid16")


@dataclass(frozen=True)
class Exported:
    """One exported file; `error` is ONNX's largest deviation from torch, relative to the largest value."""

    path: Path
    format: Format
    outputs: tuple[str, ...] = ()
    error: float | None = None


def export(
    uri: str,
    out_dir: Path | str,
    *,
    formats: Sequence[Format] = FORMATS,
    img_size: int | None = None,
    migration: MigrationConfig | Literal["off"] | None = None,
    gathering: GatheringConfig | Literal["off"] | None = None,
) -> list[Exported]:
    """Write the model at `uri` into `out_dir` and return what was written.

    - `itpn`: `model.safetensors` and `config.json`.
    - `published`: `published.pth`, a torch file with the flat published names under `model`, and our config beside.
    - `onnx`: `classifier.onnx` (image → logits; classifiers only) and `features.onnx` (image → levels 1/4, 1/8,
      1/16 of the backbone, and of the pyramid where the model has one), for one image size, any batch.

    Args:
        img_size: side of the square input of the ONNX files in pixels; None takes the model's own.
        migration: token migration of what is written, or none ("off"), in place of the model's own.
        gathering: token gathering of what is written, or none ("off"), in place of the model's own.

    Raises:
        ConfigError: an unknown format, a size that is no multiple of 16, or the extra is not installed.
        StepFailed: onnxruntime and torch disagree by more than 1e-3.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ConfigError(f"unknown export format {sorted(unknown)}", expected=", ".join(FORMATS))
    if "onnx" in formats:
        _need_onnx()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Only what is asked for is loaded: a window may fit the size of the ONNX files and not the model's own.
    written: list[Exported] = []
    if set(formats) - {"onnx"}:
        model = load(uri, migration=migration, gathering=gathering)
    if "itpn" in formats:
        save_model(out_dir, model.state_dict(), describe(model))
        written += [Exported(out_dir / name, "itpn") for name in ("model.safetensors", "config.json")]
    if "published" in formats:
        state = model.published_state_dict() if isinstance(model, MaskedFeatureModel) else model.state_dict()
        # The config travels along: shapes tell neither the heads of every width nor windows and migration.
        content = {
            "model": {name: value.clone() for name, value in state.items()},
            OWN_CONFIG: json.dumps(describe(model)),
        }
        torch.save(content, out_dir / "published.pth")
        written.append(Exported(out_dir / "published.pth", "published"))
    if "onnx" in formats:
        if img_size is not None:
            check_input_size(img_size, img_size)
        model = load(uri, img_size=img_size, migration=migration, gathering=gathering)
        size = cast(BackboneConfig, model.config).img_size
        if hasattr(model, "head"):
            written.append(_onnx(_Logits(model), ("logits",), out_dir / "classifier.onnx", size))
        names = tuple(name for name in _MAPS if name in model.forward_features(torch.zeros(1, 3, size, size)))  # type: ignore[operator]
        written.append(_onnx(_Maps(model, names), names, out_dir / "features.onnx", size))
    return written


def describe(model: nn.Module) -> dict[str, Any]:
    """The `config.json` of any model of this room."""
    if hasattr(model, "describe"):
        return cast(dict, model.describe())  # type: ignore[operator]
    return {"kind": "backbone", "backbone": cast(BackboneConfig, model.config).identity()}


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.model(image),)


class _Maps(nn.Module):
    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(image)  # type: ignore[operator]
        return tuple(features[name] for name in self.names)


def _need_onnx() -> None:
    absent = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if absent:
        raise ConfigError(
            "ONNX export needs packages that are not installed",
            expected="onnx, onnxscript, onnxruntime",
            found=f"no {', '.join(absent)}",
            remedy="pip install 'itpn-pipeline[onnx]'",
        )


@torch.no_grad()
def _onnx(module: nn.Module, names: tuple[str, ...], path: Path, size: int) -> Exported:
    """Export with a free batch size, then run another batch through onnxruntime and compare."""
    module.eval()
    sample = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (sample,),
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=list(names),
                dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=4096)}},
            )
        cast(Any, program).save(path, external_data=False)
    finally:
        quiet.setLevel(level)
    return Exported(path, "onnx", names, _check(module, path, size))


def _check(module: nn.Module, path: Path, size: int) -> float:
    import onnxruntime

    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for found, expected in zip(session.run(None, {"image": image.numpy()}), module(image), strict=True):
        scale = expected.abs().max().clamp_min(1e-8)
        errors.append((torch.from_numpy(found) - expected).abs().max() / scale)
    worst = torch.stack(errors).amax().item()  # unlike Python's max, it hands on a NaN
    if not worst <= ONNX_TOLERANCE:
        raise StepFailed(
            f"{path} does not compute what the model computes",
            expected=f"a relative deviation of at most {ONNX_TOLERANCE}",
            found=f"{worst:.1e}",
            remedy="report this with the versions of torch and onnxscript"
            if math.isfinite(worst)
            else "the model gives values that are not finite: see that its weights are sound",
        )
    return worst
