"""The classification evaluator: yields (metric, value), exact on any number of ranks.

Counts are integers, so they do not depend on how the split is shared out; the loss is summed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cluster import distributed
from stages.data import augment
from stages.evaluate.config import EvaluateConfig

TOP = 5


@torch.inference_mode()
def classification(
    model: nn.Module, feed: Any, config: EvaluateConfig, *, device: str, samples: int
) -> Iterator[tuple[str, float]]:
    """Yield `top1` and `top5` (percent) and `loss` (mean cross-entropy).

    Args:
        model: in evaluation mode, on `device`; image (B, 3, H, W) → logits (B, K).
        feed: this rank's batches; every sample of the split on exactly one rank. No collective is called while
            it is read, so ranks may have different numbers of batches.
        samples: of the whole split, which the counts must add up to.
    """
    dtype = next(model.parameters()).dtype
    counts = torch.zeros(3, dtype=torch.int64)  # samples, hits at 1, hits at 5
    loss_sum = torch.zeros((), dtype=torch.float64)
    for batch in feed:
        image = augment.normalise(augment.to_float01(batch.images.to(device)), config.mean, config.std)
        labels_B = batch.labels.to(device)
        logits_BK = model(image.to(dtype)).float()
        rank_B = rank_of_label(logits_BK, labels_B)
        counts += torch.stack(
            [torch.tensor(len(labels_B)), (rank_B < 1).sum().cpu(), (rank_B < TOP).sum().cpu()]
        )
        loss_sum += nn.functional.cross_entropy(logits_BK.double(), labels_B, reduction="sum").cpu()
    total, first, five = distributed.all_reduce_sum(counts.to(device)).tolist()
    loss = distributed.all_reduce_sum(loss_sum.to(device)).item()
    assert total == samples, f"the ranks saw {total} of {samples} samples"
    yield "top1", 100.0 * first / total
    yield "top5", 100.0 * five / total
    yield "loss", loss / total


def rank_of_label(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """int64 (B,): how many classes score higher than the true one; of equal scores the lower class index counts.

    A model whose logits are not finite ranks the true class last, so broken weights score 0.
    """
    own_B1 = logits_BK.gather(1, labels_B[:, None])
    index_1K = torch.arange(logits_BK.shape[1], device=logits_BK.device)[None]
    ahead = (logits_BK > own_B1) | ((logits_BK == own_B1) & (index_1K < labels_B[:, None]))
    rank_B = ahead.sum(1)
    finite_B = torch.isfinite(logits_BK).all(1)
    return torch.where(finite_B, rank_B, torch.full_like(rank_B, logits_BK.shape[1]))
