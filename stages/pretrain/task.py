"""Masked feature modelling as a training task: one uint8 batch becomes student input, mask and target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.data import augment
from stages.data.rng import Purpose
from stages.model import MaskedFeatureModel, Teacher, block_mask
from stages.pretrain.config import PretrainConfig
from stages.train.engine import DTYPES


class MfmTask:
    """Losses of a MaskedFeatureModel against a frozen teacher.

    Flip, colour jitter and mask are functions of (seed, epoch, sample id): the same on any number of ranks.
    """

    def __init__(
        self, config: PretrainConfig, module: MaskedFeatureModel, teacher: Teacher, device: str
    ) -> None:
        self.config, self.module, self.teacher, self.device = config, module, teacher, device
        self.grid = config.backbone.grid
        self.masked = config.objective.masked_tokens(self.grid)

    def losses(self, model: Callable[..., Any], batch: Any, step: int) -> dict[str, Tensor]:
        """`loss` and one entry per head, of one micro-batch."""
        image01 = self._augmented(batch)
        return model(self._student(image01), self._mask(batch), self.teacher(image01))

    @torch.no_grad()
    def picture(self, model: Callable[..., Any], batch: Any) -> np.ndarray:
        """Rows of up to 8 images: input, what the student sees of it, its prediction, the teacher's target.

        Features are shown as colours: the three main directions of the targets are red, green and blue, the same in
        both rows, so that a good prediction has the target's colours.
        """
        image01, mask_BN = self._augmented(batch)[:8], self._mask(batch)[:8]
        predict = self.module.predict(self._student(image01), mask_BN)
        target_BND = self.teacher(image01).float()
        head_BND = next(iter(predict.values())).float()
        scale = image01.shape[-1] // self.grid
        tiles = [image01, image01 * (1 - _enlarge(mask_BN[..., None].float(), self.grid, scale))]
        tiles += [_enlarge(x, self.grid, scale) for x in _colours(head_BND, target_BND)]
        rows = torch.cat([torch.cat(list(tile), dim=2) for tile in tiles], dim=1)
        return (rows.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()

    def _augmented(self, batch: Any) -> Tensor:
        config, key = self.config, (self.config.seed, batch.epoch, batch.sample_ids)
        image01 = augment.to_float01(batch.images.to(self.device, non_blocking=True))
        image01 = augment.flip(image01, augment.draws(1, Purpose.FLIP, *key)[:, 0], config.flip)
        if config.colour_jitter:
            jitter = config.colour_jitter
            draws = augment.draws(6, Purpose.COLOUR, *key)
            image01 = augment.colour_jitter(
                image01, draws, brightness=jitter, contrast=jitter, saturation=jitter
            )
        return image01

    def _student(self, image01: Tensor) -> Tensor:
        config = self.config
        return augment.normalise(image01, config.mean, config.std).to(DTYPES[config.engine.precision])

    def _mask(self, batch: Any) -> Tensor:
        seed, epoch = self.config.seed, batch.epoch
        masks = [
            block_mask(self.grid, self.masked, (int(Purpose.MASK), seed, epoch, int(sample)))
            for sample in batch.sample_ids
        ]
        return torch.from_numpy(np.stack(masks)).to(self.device, non_blocking=True)


def _colours(x_BND: Tensor, target_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Both projected on the targets' first three principal components (B, N, 3); the targets fill [0, 1]."""
    flat = target_BND.flatten(0, 1)
    mean = flat.mean(0)
    # The same signs in every picture: each direction points to where most of its features are positive.
    basis_D3 = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T
    basis_D3 = basis_D3 * basis_D3.sum(0).sign()
    shown = (flat - mean) @ basis_D3
    low, high = shown.amin(0), shown.amax(0)
    colours = [(((y - mean) @ basis_D3 - low) / (high - low)).clamp(0, 1) for y in (x_BND, target_BND)]
    return colours[0], colours[1]


def _enlarge(values_BNK: Tensor, grid: int, scale: int) -> Tensor:
    """K values per token → (B, K, grid*scale, grid*scale)."""
    square = values_BNK.transpose(1, 2).reshape(len(values_BNK), -1, grid, grid)
    return nn.functional.interpolate(square, scale_factor=scale, mode="nearest")
