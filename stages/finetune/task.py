"""Classification as a training task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.data import augment
from stages.data.rand_augment import DRAWS_PER_OPERATION, rand_augment
from stages.data.rng import Purpose
from stages.finetune.config import FinetuneConfig
from stages.train.engine import DTYPES


class ClassifyTask:
    """Cross-entropy on smoothed, mixed labels. All randomness of the input follows (seed, epoch, sample id)."""

    def __init__(self, config: FinetuneConfig, module: nn.Module, num_classes: int, device: str) -> None:
        self.config, self.module, self.num_classes, self.device = config, module, num_classes, device

    def losses(self, model: Callable[..., Any], batch: Any, step: int) -> dict[str, Tensor]:
        """`loss` (fp32) of one micro-batch."""
        image, target_BK = self._inputs(batch)
        logits_BK = model(image).float()
        return {"loss": -(target_BK * torch.log_softmax(logits_BK, -1)).sum(-1).mean()}

    def picture(self, model: Callable[..., Any], batch: Any) -> Any:
        """The first eight inputs as the model sees them, in a row."""
        config = self.config
        image = self._inputs(batch)[0][:8].float()
        std = torch.tensor(config.std, device=image.device).view(1, 3, 1, 1)
        mean = torch.tensor(config.mean, device=image.device).view(1, 3, 1, 1)
        row = torch.cat(list((image * std + mean).clamp(0, 1)), dim=2)
        return (row * 255).byte().permute(1, 2, 0).cpu().numpy()

    def _inputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        config, key = self.config, (self.config.seed, batch.epoch, batch.sample_ids)
        x = augment.to_float01(batch.images.to(self.device, non_blocking=True))
        x = augment.flip(x, augment.draws(1, Purpose.FLIP, *key)[:, 0], config.flip)
        if config.colour_jitter:
            j = config.colour_jitter
            draws = augment.draws(6, Purpose.COLOUR, *key)
            x = augment.colour_jitter(x, draws, brightness=j, contrast=j, saturation=j)
        if config.rand_augment:
            draws = augment.draws(2 * DRAWS_PER_OPERATION, Purpose.RAND_AUGMENT, *key)
            x = rand_augment(x, draws, magnitude=config.rand_augment, fill=config.mean)
        x = augment.normalise(x, config.mean, config.std)
        if config.random_erasing:
            draws = augment.draws(24, Purpose.ERASE, *key)
            x = augment.random_erasing(x, draws, probability=config.random_erasing)
        labels_B = batch.labels.to(self.device, non_blocking=True)
        target_BK = augment.one_hot(labels_B, self.num_classes, config.label_smoothing)
        if config.mix.mixup or config.mix.cutmix:
            draws = augment.draws(67, Purpose.MIX, *key)
            x, target_BK = augment.mix_batch(
                x, target_BK, draws, mixup_alpha=config.mix.mixup, cutmix_alpha=config.mix.cutmix
            )
        return x.to(DTYPES[config.engine.precision]), target_BK
