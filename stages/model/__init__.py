"""The model room: backbones, pyramid, masked feature modelling, teachers, import and export."""

from stages.model.backbone import build_backbone
from stages.model.config import (
    BackboneConfig,
    GatheringConfig,
    MigrationConfig,
    ObjectiveConfig,
    TeacherConfig,
    accelerated,
    backbone_config,
    sizes,
)
from stages.model.heads import Classifier
from stages.model.io import LoadReport, load, load_backbone_into, load_into, save_model
from stages.model.layer_decay import decays, layer_id, lr_scale, num_layers
from stages.model.layers import Normalisation
from stages.model.masks import block_mask
from stages.model.mfm import MaskedFeatureModel
from stages.model.teacher import Teacher, check_grids, load_teacher

__all__ = [
    "BackboneConfig",
    "MigrationConfig",
    "GatheringConfig",
    "ObjectiveConfig",
    "TeacherConfig",
    "sizes",
    "backbone_config",
    "accelerated",
    "build_backbone",
    "Classifier",
    "MaskedFeatureModel",
    "Normalisation",
    "block_mask",
    "Teacher",
    "load_teacher",
    "check_grids",
    "save_model",
    "load",
    "load_into",
    "load_backbone_into",
    "LoadReport",
    "layer_id",
    "lr_scale",
    "decays",
    "num_layers",
]
