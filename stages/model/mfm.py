"""Masked feature modelling: predict a frozen teacher's tokens from a masked image through the pyramid.

Source: iTPN (2023), `modeling_pretrain.py`. Published names apart from the prefixes `backbone.` and
`pyramid.`, which `published_state_dict` takes off. The per-level heads are ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.backbone import build_backbone
from stages.model.config import BackboneConfig, ObjectiveConfig
from stages.model.layers import Normalisation, described, drop_path_rates, init_weights
from stages.model.pyramid import LEVELS, Pyramid, patch_tokens

PATCH_SIDE = {"level16": 1, "level8": 2, "level4": 4}  # positions of a level along one side of a token


class MaskedFeatureModel(nn.Module):
    """Backbone, pyramid, and the heads that predict `teacher_dim` features for every token.

    Args:
        config: the backbone.
        objective: heads and loss.
        teacher_dim: width of the targets.

    `normalisation` is that of the inputs it was trained on, where it is known.
    """

    normalisation: Normalisation | None = None

    def __init__(self, config: BackboneConfig, objective: ObjectiveConfig, teacher_dim: int) -> None:
        super().__init__()
        self.config, self.objective, self.teacher_dim = config, objective, teacher_dim
        C, eps, fpn = config.embed_dim, config.norm_eps, objective.fpn_dim
        self.backbone = build_backbone(config)
        self.pyramid = Pyramid(C, fpn, objective.fpn_depth, eps)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.backbone.mask_token_width))
        # A level's features are spread over the positions of its patch, so each gives C numbers per token.
        self.decoder_embed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(fpn, eps=eps), nn.Linear(fpn, C // PATCH_SIDE[name] ** 2))
            for name in LEVELS
        )
        if objective.levels == "fused":
            self.norm = nn.LayerNorm(C, eps=eps)
            self.lm_head = nn.Linear(C, teacher_dim)
        else:
            self.level_norms = nn.ModuleList(nn.LayerNorm(C, eps=eps) for _ in LEVELS)
            self.level_heads = nn.ModuleList(nn.Linear(C, teacher_dim) for _ in LEVELS)
        self.tap: int | None = None
        if objective.auxiliary:
            self.tap = int(0.75 * config.depths[2])
            rates = drop_path_rates(config.drop_path, sum(config.depths))
            first = sum(config.depths[:2]) + self.tap
            self.cls_pt_layers = nn.ModuleList(
                self.backbone.make_block(rates[min(first + i, len(rates) - 1)]) for i in range(2)
            )
            self.norm_cls = nn.LayerNorm(C, eps=eps)
            self.lm_cls_head = nn.Linear(C, teacher_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for name, module in self.named_children():
            if name not in ("backbone", "pyramid"):
                module.apply(init_weights)

    def predict(self, image_BCHW: Tensor, mask_BN: Tensor | None) -> dict[str, Tensor]:
        """Each head's prediction (B, N, teacher_dim): `pyramid` or `level16|8|4`, and `auxiliary`."""
        mask_token = None if mask_BN is None else self.mask_token
        # Called as a module, not by method: DeepSpeed's ZeRO-3 gathers parameters on that call.
        features = self.backbone(image_BCHW, mask_BN, mask_token, tap=self.tap)
        maps = self.pyramid(features)
        levels = [
            patch_tokens(embed(maps[name]), PATCH_SIDE[name])
            for name, embed in zip(LEVELS, self.decoder_embed, strict=True)
        ]
        if self.objective.levels == "fused":
            out = {"pyramid": self.lm_head(self.norm(levels[0] + levels[1] + levels[2]))}
        else:
            heads = zip(LEVELS, levels, self.level_norms, self.level_heads, strict=True)
            out = {name: head(norm(x)) for name, x, norm, head in heads}
        if self.tap is not None:
            H, W = features["level16"].shape[-2:]
            x = self.backbone.run_blocks(self.cls_pt_layers, features["tap"], (H, W))
            out["auxiliary"] = self.lm_cls_head(self.norm_cls(x))
        return out

    def forward(self, image_BCHW: Tensor, mask_BN: Tensor, target_BND: Tensor) -> dict[str, Tensor]:
        """The losses: `loss`, their sum (fp32 scalar), and `loss_<head>` for each head.

        Args:
            image_BCHW: normalised image.
            mask_BN: bool, True where hidden.
            target_BND: the teacher's tokens, any float dtype.
        """
        objective = self.objective
        losses = {
            f"loss_{name}": feature_loss(x, target_BND, mask_BN, objective)
            for name, x in self.predict(image_BCHW, mask_BN).items()
        }
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def forward_features(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """The backbone's levels, and the pyramid's as `pyramid16|8|4` (B, fpn_dim, H, W), without a mask."""
        features = self.backbone(image_BCHW)
        maps = self.pyramid(features)
        return features | {f"pyramid{name[5:]}": x.permute(0, 3, 1, 2) for name, x in maps.items()}

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The backbone's weights under their published names: what fine-tuning starts from."""
        return dict(self.backbone.state_dict())

    def published_state_dict(self) -> dict[str, Tensor]:
        """All weights under the flat names of the published iTPN pre-training checkpoints."""
        return {published_name(name): value for name, value in self.state_dict().items()}

    def describe(self) -> dict[str, Any]:
        """The JSON config that `save_model` writes and `load` reads."""
        return {
            "kind": "pretrain",
            "backbone": self.config.identity(),
            "objective": self.objective.identity(),
            "teacher_dim": self.teacher_dim,
            **described(self.normalisation),
        }


def published_name(name: str) -> str:
    """Our name of a pre-training parameter → the flat published one."""
    return name.removeprefix("backbone.").removeprefix("pyramid.")


def feature_loss(x_BND: Tensor, target_BND: Tensor, mask_BN: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Mean loss in fp32 over all tokens, or over the hidden ones: SmoothL1 (beta 1), or 1 − cosine."""
    x, target = x_BND.float(), target_BND.float()
    if objective.loss == "smooth_l1":
        loss_BN = F.smooth_l1_loss(x, target, reduction="none").mean(-1)
    else:
        loss_BN = 1 - F.cosine_similarity(x, target, dim=-1)
    if objective.on == "all":
        return loss_BN.mean()
    weight = mask_BN.to(loss_BN.dtype)  # a weighted mean keeps shapes static
    return (loss_BN * weight).sum() / weight.sum()
