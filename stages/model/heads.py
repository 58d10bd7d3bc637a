"""The classifier: mean over tokens, LayerNorm, linear head, at the top level of the backbone's own names.

It extends the backbone class instead of wrapping it, so that every parameter keeps its published name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stages.model.config import BackboneConfig
from stages.model.fast_itpn import FastITPN
from stages.model.itpn import ITPN
from stages.model.layers import Normalisation, described, init_weights


class _Head(nn.Module):
    """Mixed into a backbone class: adds `fc_norm` and `head`.

    `classes` names the head's rows in order (class folders: WordNet ids in ImageNet), `normalisation` is the mean
    and standard deviation (of RGB in [0, 1]) of the inputs that it was trained on, where that is known.
    """

    classes: tuple[str, ...] | None = None
    normalisation: Normalisation | None = None

    def __init__(self, config: BackboneConfig, num_classes: int, head_init_scale: float) -> None:
        super().__init__(config)  # the backbone comes next in the class order
        self.num_classes = num_classes
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.embed_dim, num_classes)
        self.head.apply(init_weights)
        self.head.weight.data.mul_(head_init_scale)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        tokens_BNC = self.forward_features(image_BCHW)["tokens"]  # type: ignore[operator]
        return self.head(self.fc_norm(tokens_BNC.mean(1)))

    def describe(self) -> dict[str, Any]:
        """The JSON config that `save_model` writes and `load` reads."""
        config: BackboneConfig = self.config  # type: ignore[assignment]
        found = {"kind": "classifier", "backbone": config.identity(), "num_classes": self.num_classes}
        found |= {"classes": list(self.classes)} if self.classes is not None else {}
        return found | described(self.normalisation)


class FastITPNClassifier(_Head, FastITPN):  # type: ignore[misc]  # forward gives logits
    """Fast-iTPN with a classification head; keys as in `fast_itpn_*_patch16_*`."""


class ITPNClassifier(_Head, ITPN):  # type: ignore[misc]
    """iTPN with a classification head."""


def Classifier(
    config: BackboneConfig, num_classes: int, head_init_scale: float = 0.001
) -> FastITPNClassifier | ITPNClassifier:
    """A classifier of the config's family.

    Args:
        num_classes: rows of the head.
        head_init_scale: factor on the head's initial weights (published: 0.001).
    """
    family = FastITPNClassifier if config.family == "fast_itpn" else ITPNClassifier
    return family(config, num_classes, head_init_scale)
