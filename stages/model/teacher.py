"""The frozen teacher: any supported vision tower turned into targets for masked feature modelling.

Target (iTPN, `engine_for_pretraining.py`): patch tokens → post-LN → projection → LayerNorm without affine.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster import storage
from cluster.errors import ConfigError, DataInvalid, StorageUnavailable
from stages.model import sharded
from stages.model.clip_tower import ClipTower, from_hf, from_openai, hf_arguments, open_clip_arguments
from stages.model.config import BackboneConfig, TeacherConfig
from stages.model.files import is_torchscript, local_copy, read_state
from stages.model.hf_towers import is_clip, is_known, load_hf_tower
from stages.model.places import beside, file_name, is_index, is_weights_file

log = logging.getLogger(__name__)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CONFIGS = {"hf": "config.json", "open_clip": "open_clip_config.json"}
_WHOLE = ("model.safetensors", "open_clip_model.safetensors")
_INDEX = "model.safetensors.index.json"  # of several files
_WEIGHTS = (
    _WHOLE[0],
    _INDEX,
    _WHOLE[1],
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True)
class Tower:
    """A vision tower and what must be known to feed it. `module(image)` gives patch tokens first."""

    module: nn.Module
    patch_size: int
    native_size: int  # pixels
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Teacher(nn.Module):
    """Targets from images. Frozen: no parameter has a gradient, and no graph is built.

    Attributes:
        input_size: pixels of a side of the images that it sees.
        grid: tokens along a side.
        dim: width of the targets.
        sha256: of the weights file; of several files as `stages.model.sharded` says.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: Tower, config: TeacherConfig, sha256: str, device: torch.device) -> None:
        super().__init__()
        self.input_size = config.input_size or tower.native_size
        if self.input_size % tower.patch_size:
            below = self.input_size // tower.patch_size * tower.patch_size
            raise ConfigError(
                f"teacher.input_size {self.input_size} is no multiple of the teacher's patch size",
                expected=f"a multiple of {tower.patch_size}",
                found=self.input_size,
                remedy=f"teacher.input_size={below or tower.patch_size} or {below + tower.patch_size}",
            )
        self.patch_size, self.dim, self.sha256 = tower.patch_size, tower.dim, sha256
        self.grid = self.input_size // tower.patch_size
        self.published_scaling = config.published_scaling
        fp32 = config.precision == "fp32" or (config.precision == "auto" and device.type == "cpu")
        self.dtype = torch.float32 if fp32 else torch.bfloat16
        self.tower = tower.module.eval().requires_grad_(False).to(device, self.dtype)
        self.register_buffer("mean", torch.tensor(tower.mean, device=device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(tower.std, device=device).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, image01_BCHW: Tensor) -> Tensor:
        """Targets (B, grid², dim), fp32.

        Args:
            image01_BCHW: float, values in [0, 1]. Images of another size than `input_size` are resized
                (bicubic, antialiased).
        """
        x = image01_BCHW.float()
        if tuple(x.shape[-2:]) != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        if self.published_scaling:
            x = (x + 1) / 2
        tokens_BND = self.tower(((x - self.mean) / self.std).to(self.dtype))[0]
        return F.layer_norm(tokens_BND.float(), (self.dim,))

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)


def load_teacher(config: TeacherConfig, device: torch.device | str = "cpu") -> Teacher:
    """The teacher that the config names, on `device`.

    Raises:
        ConfigError: the name or layout is not understood.
        DataInvalid: the weights are missing, broken, give values that are not finite, or differ from `sha256`.
    """
    files = find_files(config)
    with local_copy(files.weights, sha256=config.sha256) as path:
        sha256 = config.sha256 or sharded.sha256_of(path)
        try:
            tower = _tower(config, files, path)
        except (
            DataInvalid
        ) as error:  # told of a local copy, or of tensors: the reader knows the file by its URI
            raise DataInvalid(
                f"teacher {files.weights}: {error.message}",
                expected=error.expected,
                found=error.found,
                remedy=error.remedy,
            ) from None
    teacher = Teacher(tower, config, sha256, torch.device(device))
    grey = torch.full((1, 3, teacher.input_size, teacher.input_size), 0.5, device=device)
    if not torch.isfinite(teacher(grey)).all():
        raise DataInvalid(
            f"teacher {files.weights}: its targets are not finite",
            expected="finite features of a grey image",
            remedy="the weights are damaged: fetch them again, and pin them with teacher.sha256",
        )
    return teacher


@dataclass(frozen=True)
class TeacherFiles:
    """Where a teacher's weights and its config (if it has one) stand, and their layout."""

    weights: str
    layout: str
    config: dict[str, Any] | None
    preprocessor: dict[str, Any] | None


def find_files(config: TeacherConfig) -> TeacherFiles:
    """Resolve `config.uri`: a weights file, the index of several, or a folder that holds one beside its config."""
    uri = _from_hub(name) if (name := hub_name(config.uri)) else storage.join(config.uri)
    weights = uri if _is_file(uri) else None
    # With the name of a file in that folder `beside` finds the others there.
    inside = weights or storage.join(uri, _WEIGHTS[0])
    configs = {layout: _json_at(beside(inside, name)) for layout, name in _CONFIGS.items()}
    hf, open_clip = configs["hf"], configs["open_clip"]
    # Hub folders may hold one model in several layouts side by side, and timm's config.json says no model type.
    hf_counts = hf is not None and (open_clip is None or is_known(hf))
    by_config = "hf" if hf_counts else "openai" if open_clip is None else "open_clip"
    wanted = by_config if config.layout == "auto" else config.layout
    if weights is None:
        names = sorted(_WEIGHTS, key=lambda name: name.startswith("open_clip") != (wanted == "open_clip"))
        weights = next((found for name in names if storage.exists(found := beside(inside, name))), None)
    if weights is None:
        raise DataInvalid(
            f"no teacher at {config.uri}",
            expected="a weights file, or a folder with one of " + ", ".join(_WEIGHTS),
            found="neither",
            remedy="correct teacher.uri",
        )
    by_name = config.layout == "auto" and file_name(weights).startswith("open_clip")
    layout = "open_clip" if by_name else wanted
    preprocessor = _json_at(beside(weights, "preprocessor_config.json"))
    return TeacherFiles(weights, layout, configs.get(layout), preprocessor)


def _is_file(uri: str) -> bool:
    return is_weights_file(uri) or is_index(uri)


def _json_at(uri: str) -> dict[str, Any] | None:
    return storage.read_json(uri) if storage.exists(uri) else None


def hub_name(uri: str) -> str | None:
    """The hub repository that a URI names: `hf://org/name`, or `org/name` where there is no such path."""
    name = uri.removeprefix("hf://")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or _is_file(name):
        return None
    return name if uri.startswith("hf://") or not Path(uri).exists() else None


def on_hub(name: str) -> bool:
    """Whether the hub has a repository of this name that this machine may read, or the cache has its config."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _CONFIGS.values()):
        return True
    try:
        HfApi().model_info(name, timeout=20)
    except Exception:  # the hub's errors and those of the HTTP client below it share no base class
        return False
    return True


def _from_hub(name: str) -> str:
    """Folder of the hub's files, from its local cache where they are there already."""
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", *_WHOLE]))
        index = folder / _INDEX
        if index.is_file() and not any((folder / file).is_file() for file in _WHOLE):
            snapshot_download(name, allow_patterns=["*.json", *sharded.files_of(index)])
        return str(folder)
    except DataInvalid:
        raise
    except Exception as error:  # the hub's errors and those of the HTTP client below it share no base class
        raise StorageUnavailable(
            f"the teacher '{name}' could not be fetched from the Hugging Face hub",
            expected="a local path, or a hub repository that holds safetensors",
            found=f"no local path of that name; the hub said: {str(error).splitlines()[0][:200]}",
            remedy="check the name and the network, or download the model and give its folder as teacher.uri",
        ) from None


def _tower(config: TeacherConfig, files: TeacherFiles, path: Path) -> Tower:
    if files.layout != "hf" or files.config is None or is_clip(files.config):
        return _clip(config, files, path)
    module, facts = load_hf_tower(files.config, path)
    mean, std = _mean_std(files, facts.pop("mean"), facts.pop("std"))
    return Tower(module, mean=mean, std=std, **facts)


def _clip(config: TeacherConfig, files: TeacherFiles, path: Path) -> Tower:
    state = read_state(path)
    arguments: dict[str, Any] = {"heads": None, "quick_gelu": files.layout != "open_clip"}
    if files.layout == "hf":
        vision = from_hf(state)
        arguments |= hf_arguments(files.config or {})
    else:
        vision = from_openai(state)
        if files.config is not None:
            arguments |= open_clip_arguments(files.config)
    if config.heads is not None:
        arguments["heads"] = config.heads
    if config.activation != "auto":
        arguments["quick_gelu"] = config.activation == "quick_gelu"
    elif files.config is None and not is_torchscript(path):  # such archives are OpenAI's own
        log.warning(
            "%s has no config beside it: its activation is taken to be %s; set teacher.activation",
            files.weights,
            "quick_gelu" if arguments["quick_gelu"] else "gelu",
        )
    tower = ClipTower(vision, **arguments)
    return Tower(tower, tower.patch_size, tower.native_grid * tower.patch_size, tower.dim, *_mean_std(files))


def _mean_std(
    files: TeacherFiles, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> tuple[Any, Any]:
    """What the files say: transformers' preprocessor, open_clip's `preprocess_cfg`, else the tower's own."""
    hf, open_clip = files.preprocessor or {}, (files.config or {}).get("preprocess_cfg", {})
    found_mean = hf.get("image_mean") or open_clip.get("mean") or mean
    found_std = hf.get("image_std") or open_clip.get("std") or std
    return tuple(found_mean), tuple(found_std)


def check_grids(backbone: BackboneConfig, teacher: Teacher, teacher_dim: int | None = None) -> None:
    """Student and teacher must have equal grids; raises ConfigError that names the sizes which would fit.

    `teacher_dim` is the width that existing heads predict, where there are some: it must be the teacher's.
    """
    if teacher_dim not in (None, teacher.dim):
        raise ConfigError(
            "the model's heads predict another width than the teacher's",
            expected=f"{teacher_dim} features per token",
            found=f"{teacher.dim}",
            remedy="use the teacher that the model was pre-trained with, or start its heads anew",
        )
    if backbone.grid == teacher.grid:
        return
    student_fits = teacher.grid * backbone.patch_size
    teacher_fits = backbone.grid * teacher.patch_size
    raise ConfigError(
        f"the teacher's {teacher.grid}×{teacher.grid} grid does not fit the student's "
        f"{backbone.grid}×{backbone.grid} grid",
        expected=f"{backbone.grid}×{backbone.grid} tokens from both",
        found=f"student input {backbone.img_size} (patch {backbone.patch_size}), "
        f"teacher input {teacher.input_size} (patch {teacher.patch_size})",
        remedy=f"teacher.input_size={teacher_fits} with a student input of {backbone.img_size}, "
        f"or a student input of {student_fits} with teacher.input_size={teacher.input_size}",
    )
