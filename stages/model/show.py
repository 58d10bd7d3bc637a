"""Pictures of what a model sees: input, mask, feature maps of every level, the teacher's, migrated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.model.config import BackboneConfig, MigrationConfig, ObjectiveConfig, TeacherConfig
from stages.model.io import load
from stages.model.layers import Normalisation
from stages.model.masks import block_mask
from stages.model.mfm import MaskedFeatureModel
from stages.model.teacher import Teacher, check_grids, load_teacher

PANEL, LABEL = 192, 26  # pixels
TEXT = 18  # pixels
MAX_PIXELS = 64_000_000
_LEVELS = ("level16", "level8", "level4")


@torch.no_grad()
def show(
    uri: str,
    images: Sequence[str],
    out_png: Path | str,
    *,
    teacher: str | TeacherConfig | None = None,
    migration: MigrationConfig | None = None,
    normalisation: Normalisation | None = None,
    seed: int = 0,
) -> Path:
    """Write one row of panels per image and return the path of the PNG.

    Panels: the input; the mask (pre-trained models); each level's features as colours (their three
    principal components over the image); the teacher's targets and the model's prediction of them from the masked
    image, in the teacher's colours; which tokens migrated (dark).

    Args:
        uri: what `load` reads.
        images: paths or URIs of pictures.
        teacher: URI or config of the teacher whose targets are shown. One named by its URI sees an input that
            gives the model's grid, whatever its own is.
        migration: shown in place of the model's own setting.
        normalisation: of the inputs; by default the one that the model was trained with, as its config.json says,
            and where that is silent mean and standard deviation 0.5.
        seed: of the masks.

    Raises:
        ConfigError: no image was named, or the teacher's grid does not fit.
        DataInvalid: a model, teacher or picture cannot be read.
    """
    if not images:
        raise ConfigError("no image to show", expected="at least one picture", found="none")
    model = load(uri, migration=migration)
    config = cast(BackboneConfig, model.config)
    known = normalisation or getattr(model, "normalisation", None) or Normalisation((0.5,) * 3, (0.5,) * 3)
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in known)
    tower = None
    if teacher is not None:
        tower = _fitting(teacher, config) if isinstance(teacher, str) else load_teacher(teacher)
        check_grids(config, tower)
    rows = []
    for number, name in enumerate(images):
        picture = read_picture(name, config.img_size)
        x = ((picture - mean_C11) / std_C11).unsqueeze(0)
        panels = {"input": _rgb(picture)}
        mask: Tensor | None = None
        if isinstance(model, MaskedFeatureModel):
            mask = _mask(config.grid, model.objective, (seed, number))
            panels["mask"] = _shade(picture, ~mask, config.grid)
        features = cast(dict[str, Tensor], model.forward_features(x))  # type: ignore[operator]
        for level in _LEVELS:
            name = f"pyramid{level[5:]}"
            x_HWC = features[name if name in features else level][0].permute(1, 2, 0)
            x_HWC = without_pattern(x_HWC, config.grid) if name in features else x_HWC
            panels[f"1/{level[5:]}"] = _colours(x_HWC)
        if tower is not None:
            target = tower(picture.unsqueeze(0))[0].unflatten(0, (config.grid, config.grid))
            panels["teacher"] = _colours(target)
            if isinstance(model, MaskedFeatureModel) and model.teacher_dim == tower.dim and mask is not None:
                found = model.predict(x, mask.unsqueeze(0))
                best = next(iter(found.values()))[0].unflatten(0, (config.grid, config.grid))
                panels["prediction"] = _colours(best, basis=target)
        if "migrated" in features:
            panels["kept tokens"] = _shade(picture, ~features["migrated"][0], config.grid)
        rows.append(panels)
    return _write(rows, Path(out_png))


def read_picture(uri: str, size: int) -> Tensor:
    """A picture's central square, resized to size×size: (3, H, W) in [0, 1]. Raises DataInvalid."""
    data = storage.read_bytes(uri)
    try:
        with Image.open(BytesIO(data)) as file:
            if file.width * file.height > MAX_PIXELS:
                raise DataInvalid(
                    f"{uri} is too large to show",
                    expected=f"at most {MAX_PIXELS} pixels",
                    found=f"{file.size}",
                )
            side = min(file.size)
            left, top = (file.width - side) // 2, (file.height - side) // 2
            square = file.convert("RGB").crop((left, top, left + side, top + side))
            pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataInvalid(f"{uri} is no picture that can be read", found=str(error)[:200]) from None
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def without_pattern(x_HWC: Tensor, grid: int) -> Tensor:
    """A map less the mean, over all patches, of each position inside a patch.

    Levels of the pyramid predict a patch from all of its positions together, so each position has features of its
    own, the same in every patch: that pattern is stronger than the picture.
    """
    side = x_HWC.shape[0] // grid
    x = x_HWC.unflatten(0, (grid, side)).unflatten(2, (grid, side))  # (grid, side, grid, side, C)
    return (x - x.mean((0, 2), keepdim=True)).flatten(2, 3).flatten(0, 1)


def _fitting(uri: str, config: BackboneConfig) -> Teacher:
    """The teacher at an input that gives as many tokens as the model has; its own where that fits."""
    teacher = load_teacher(TeacherConfig(uri=uri))
    size = config.grid * teacher.patch_size
    if teacher.input_size == size:
        return teacher
    return load_teacher(TeacherConfig(uri=uri, input_size=size))


def _mask(grid: int, objective: ObjectiveConfig, seed: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(block_mask(grid, objective.masked_tokens(grid), seed))


def _colours(x_HWC: Tensor, basis: Tensor | None = None) -> np.ndarray:
    """Features as colours: projected on the three main directions of `basis` (default: themselves)."""
    reference = (x_HWC if basis is None else basis).flatten(0, 1).double()
    mean = reference.mean(0)
    _, vectors = torch.linalg.eigh((reference - mean).t() @ (reference - mean))
    axes = vectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the same colours every time
    inside = (reference - mean) @ axes
    low, high = inside.quantile(0.01, 0), inside.quantile(0.99, 0)
    colours = ((x_HWC.double() - mean) @ axes - low) / (high - low).clamp_min(1e-9)
    return _rgb(colours.clamp(0, 1).permute(2, 0, 1).float())


def _shade(picture: Tensor, lit: Tensor, grid: int) -> np.ndarray:
    """The picture with the patches that are not `lit` darkened."""
    light = F.interpolate(lit.view(1, 1, grid, grid).float(), size=tuple(picture.shape[1:]))[0]
    return _rgb(picture * (0.2 + 0.8 * light))


def _rgb(image_CHW: Tensor) -> np.ndarray:
    return (image_CHW.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _write(rows: list[dict[str, np.ndarray]], path: Path) -> Path:
    width, height = len(rows[0]) * (PANEL + 4), LABEL + len(rows) * (PANEL + 4)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for row, panels in enumerate(rows):
        for column, (label, pixels) in enumerate(panels.items()):
            if row == 0:
                draw.text((column * (PANEL + 4) + 4, 2), label, fill="black", font=font)
            panel = Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.NEAREST)
            sheet.paste(panel, (column * (PANEL + 4) + 2, LABEL + row * (PANEL + 4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
