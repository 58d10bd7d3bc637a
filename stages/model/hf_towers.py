"""Vision towers that run in transformers: SigLIP, DINOv2 and DINOv3. CLIP has a tower of its own here.

Their targets are the patch tokens after the last norm; they have no projection to a shared space.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster import scratch
from cluster.errors import ConfigError, DataInvalid
from stages.model import sharded
from stages.model.files import read_state
from stages.model.places import is_index

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# model_type -> (transformers class, mean, std)
_CLASSES: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "siglip": ("SiglipVisionModel", HALF, HALF),
    "siglip_vision_model": ("SiglipVisionModel", HALF, HALF),
    "dinov2": ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD),
    "dinov3_vit": ("DINOv3ViTModel", IMAGENET_MEAN, IMAGENET_STD),
}


class HfTower(nn.Module):
    """A transformers vision model whose forward gives patch tokens and a summary, as ClipTower's does."""

    def __init__(self, model: nn.Module, first_patch: int, interpolate: bool) -> None:
        super().__init__()
        self.model = model
        self.first_patch, self.interpolate = first_patch, interpolate

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        extra = {"interpolate_pos_encoding": True} if self.interpolate else {}
        tokens = self.model(pixel_values=image_BCHW, **extra).last_hidden_state
        patches = tokens[:, self.first_patch :]
        return patches, tokens[:, 0] if self.first_patch else patches.mean(1)


def is_clip(config: dict[str, Any]) -> bool:
    """Whether a Hugging Face config.json describes a CLIP."""
    return config.get("model_type") in ("clip", "clip_vision_model")


def is_known(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a tower that is read in Hugging Face's layout."""
    return is_clip(config) or config.get("model_type") in _CLASSES


def load_hf_tower(config: dict[str, Any], weights: Path) -> tuple[HfTower, dict[str, Any]]:
    """The tower, and the facts `patch_size`, `native_size`, `dim`, `mean`, `std`.

    Raises:
        ConfigError: a model type that is not supported.
        DataInvalid: the weights do not fit the config.
    """
    kind = str(config.get("model_type"))
    if kind not in _CLASSES:
        raise ConfigError(
            f"teachers of type '{kind}' are not supported",
            expected="clip, " + ", ".join(_CLASSES),
            found=kind,
            remedy="choose another teacher",
        )
    import transformers  # takes seconds to import

    class_name, mean, std = _CLASSES[kind]
    vision = config.get("vision_config") or config
    # transformers reads a folder with fixed file names, and never a pickle: others are converted first.
    with tempfile.TemporaryDirectory(prefix="teacher-", dir=scratch.folder()) as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        target = Path(folder) / "model.safetensors"
        if is_index(weights):
            # transformers asks for `metadata`, which not every index has.
            index = {"metadata": {}, "weight_map": sharded.weight_map(weights)}
            (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
            for name in sharded.files_of(weights):
                (Path(folder) / name).symlink_to((weights.parent / name).resolve())
        elif weights.suffix == ".safetensors":
            target.symlink_to(weights.resolve())
        else:
            save_file({k: v.contiguous() for k, v in read_state(weights).items()}, target)
        loader = getattr(transformers, class_name).from_pretrained
        try:
            model, report = loader(
                folder,
                use_safetensors=True,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise DataInvalid(f"the teacher in {weights} cannot be read", found=str(error)[:300]) from None
    if missing := sorted(report["missing_keys"]):
        raise DataInvalid(
            f"the teacher in {weights} lacks weights",
            expected=f"a {class_name}",
            found=f"missing {', '.join(missing[:5])}",
        )
    siglip = kind.startswith("siglip")
    # DINO puts a class token, and sometimes registers, in front of the patches.
    first_patch = 0 if siglip else 1 + int(vision.get("num_register_tokens", 0))
    facts = {
        "patch_size": model.config.patch_size,
        "native_size": model.config.image_size,
        "dim": model.config.hidden_size,
        "mean": mean,
        "std": std,
    }
    return HfTower(model, first_patch, siglip), facts
