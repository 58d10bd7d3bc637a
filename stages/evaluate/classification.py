"""The classification evaluator: accuracy, loss and calibration, exact on any number of ranks, and every class.

Counts are integers, so they do not depend on how the split is shared out; losses are summed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cluster import distributed
from stages.evaluate.config import Classification
from stages.evaluate.found import Values
from stages.evaluate.label_space import LabelSpace

TOP = 5
BROKEN = "(not finite)"  # the prediction of logits that are no numbers


class ClassificationMeter:
    """Takes the logits of batches, each sample on exactly one rank, then yields the figures of all ranks.

    Calibration is the expected calibration error of Guo et al. 2017 (arXiv:1706.04599): confidences, the largest
    softmax probability of each sample, fall into M bins of equal width ((m − 1)/M, m/M]; ECE = Σ |B_m|/n ·
    |accuracy(B_m) − mean confidence(B_m)|, a fraction of 1.

    Args:
        classes: the data set's class names in label order.
        samples: of the whole split, which the counts must add up to.

    Attributes:
        covered, facts, variant, notes: for `Found`.
    """

    def __init__(
        self, config: Classification, space: LabelSpace, classes: list[str], *, device: str, samples: int
    ) -> None:
        self.config, self.device, self.samples = config, device, samples
        self.subset = config.restrict and space.is_subset
        self.covered, self.facts = samples, {"classes_by": space.how}
        self.variant = "all classes" if space.is_subset and not self.subset else ""
        self.notes = (
            ["the class folders are numbers: taken as class indices"] if space.how == "number" else []
        )
        if self.subset:
            self.notes.append(f"predictions among {len(classes)} of the classifier's {space.rows} classes")
        self.index = torch.tensor(space.index, device=device)
        if self.subset:
            self.classes = classes  # of predictions; those of labels are always the data set's
        else:
            row = dict(zip(space.index, classes, strict=True))
            self.classes = [row.get(i, f"class {i} of the classifier") for i in range(space.rows)]
        self.labels = classes
        self.per_class = torch.zeros(3, len(classes), dtype=torch.int64)  # samples, hits at 1, hits at 5
        self.bin_counts = torch.zeros(2, config.ece_bins, dtype=torch.int64)  # samples, hits
        self.confidence = torch.zeros(config.ece_bins, dtype=torch.float64)
        self.loss = torch.zeros(1, dtype=torch.float64)
        self.wrong: list[Tensor] = []  # label * (classes + 1) + prediction

    def update(self, batch: Any, logits_BK: Tensor) -> None:
        """Count one batch; `logits_BK` (B, rows of the head) fp32."""
        labels_B = batch.labels.to(self.device)
        if self.subset:
            logits_BK, target_B = logits_BK.index_select(1, self.index), labels_B
        else:
            target_B = self.index[labels_B]
        rank_B = rank_of_label(logits_BK, target_B)
        hit_B = rank_B < 1
        logits_BK = logits_BK.double()
        self.loss += nn.functional.cross_entropy(logits_BK, target_B, reduction="sum").cpu()
        self.per_class += torch.stack(
            [
                torch.bincount(labels_B[chosen_B], minlength=len(self.labels)).cpu()
                for chosen_B in (rank_B >= 0, hit_B, rank_B < TOP)
            ]
        )
        top_B, predicted_B = logits_BK.softmax(1).max(1)
        bins = self.config.ece_bins
        bin_B = ((top_B.nan_to_num(1.0) * bins).ceil().long() - 1).clamp(0, bins - 1)
        for row, chosen_B in enumerate((rank_B >= 0, hit_B)):
            self.bin_counts[row] += torch.bincount(bin_B[chosen_B], minlength=bins).cpu()
        self.confidence += torch.bincount(bin_B, weights=top_B, minlength=bins).cpu()
        predicted_B = torch.where(torch.isfinite(logits_BK).all(1), predicted_B, len(self.classes))
        code_B = labels_B * (len(self.classes) + 1) + predicted_B
        self.wrong.append(code_B[~hit_B].cpu())

    def finish(self) -> Values:
        """Yield `top1`, `top5`, `mean_class_top1`, `worst_class_top1` (percent), `loss` (mean cross-entropy), `ece`.

        Collective: every rank calls it once.
        """
        for name in ("per_class", "bin_counts", "confidence", "loss"):
            value = getattr(self, name)
            setattr(self, name, distributed.all_reduce_sum(value.to(self.device)).cpu())
        codes, counts = torch.cat([*self.wrong, torch.zeros(0, dtype=torch.int64)]).unique(return_counts=True)
        self.pairs: dict[int, int] = {}
        for theirs in distributed.gather_objects((codes.tolist(), counts.tolist())):
            for code, number in zip(*theirs, strict=True):
                self.pairs[code] = self.pairs.get(code, 0) + number
        total, first, five = self.per_class.sum(1).tolist()
        assert total == self.samples, f"the ranks saw {total} of {self.samples} samples"
        there = self.per_class[0] > 0
        by_class = 100.0 * self.per_class[1, there].double() / self.per_class[0, there]
        gap = (self.bin_counts[1].double() - self.confidence).abs()  # |accuracy − confidence| · |bin|
        yield "top1", 100.0 * first / total
        yield "top5", 100.0 * five / total
        yield "loss", self.loss.item() / total
        yield "ece", gap.sum().item() / total
        yield "mean_class_top1", by_class.mean().item()
        yield "worst_class_top1", by_class.min().item()

    def table(self) -> dict[str, Any]:
        """Every class, the most frequent confusions and the calibration bins, JSON-ready; after `finish`."""
        samples, first, five = self.per_class.tolist()
        names = [*self.classes, BROKEN]
        most = sorted(self.pairs.items(), key=lambda item: (-item[1], item[0]))[: self.config.confused_pairs]
        sizes, hits = self.bin_counts.tolist()
        bins = self.config.ece_bins
        mean = lambda value, n: value / n if n else None  # noqa: E731
        return {
            "classes": [
                {"class": name, "samples": n, "top1": mean(100.0 * a, n), "top5": mean(100.0 * b, n)}
                for name, n, a, b in zip(self.labels, samples, first, five, strict=True)
            ],
            "confused": [
                {"class": self.labels[code // len(names)], "predicted": names[code % len(names)], "samples": n}
                for code, n in most
            ],
            "calibration": [
                {"from": m / bins, "to": (m + 1) / bins, "samples": n, "accuracy": mean(hit, n),
                 "confidence": mean(total, n) if total == total else None}
                for m, (n, hit, total) in enumerate(zip(sizes, hits, self.confidence.tolist(), strict=True))
            ],
        }  # fmt: skip


def rank_of_label(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """int64 (B,): how many classes score higher than the true one; of equal scores the lower class index counts.

    A model whose logits are not finite ranks the true class last, so broken weights score 0.
    """
    own_B1 = logits_BK.gather(1, labels_B[:, None])
    index_1K = torch.arange(logits_BK.shape[1], device=logits_BK.device)[None]
    ahead = (logits_BK > own_B1) | ((logits_BK == own_B1) & (index_1K < labels_B[:, None]))
    rank_B = ahead.sum(1)
    finite_B = torch.isfinite(logits_BK).all(1)
    return torch.where(finite_B, rank_B, torch.full_like(rank_B, logits_BK.shape[1]))
